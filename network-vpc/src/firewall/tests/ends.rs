//! Whose conversations are, and for whom they began.

use super::*;

/// A peer may speak from one port with two addresses of an interface's.
#[test]
fn conversations_with_each_own_address_are_apart() {
    let mut table = Conntrack::new(1000);
    let both = policy(&[Rule::tcp(22, nearby())], &[]);
    let other = Ipv4Addr::new(10, 0, 0, 5);
    for own in [OWN, other] {
        for (way, letters, sequence, acknowledged) in
            [(Ingress, "S", 70, 0), (Egress, "SA", 90, 71), (Ingress, "A", 71, 91)]
        {
            let flags = flags(letters, sequence, acknowledged);
            let flow = match way {
                Ingress => Flow { destination: own, ..inwards(tcp(5, 22, flags)) },
                Egress => Flow { source: own, ..outwards(tcp(22, 5, flags)) },
            };
            assert!(table.allows(&both, way, &flow, 0), "{own}: {letters}");
        }
    }
    // Both go on without a rule, until one of the addresses is another's.
    let goes_on = |table: &mut Conntrack, own| {
        let flow = Flow { destination: own, ..inwards(tcp(5, 22, flags("A", 71, 91))) };
        table.allows(&policy(&[], &[]), Ingress, &flow, 100)
    };
    assert!(goes_on(&mut table, OWN) && goes_on(&mut table, other));
    table.forget(|address| address == other);
    assert!(goes_on(&mut table, OWN) && !goes_on(&mut table, other));
    table.check();
}

/// What has begun it was forgotten before it was answered.
#[test]
fn who_was_let_in_again_goes_on_with_what_was_answered_meanwhile() {
    let mut table = Conntrack::new(1000);
    let friend = policy(&[Rule::tcp(22, "198.51.100.7/32".parse().unwrap())], &[]);
    let shown = inwards(tcp(5, 22, flags("S", 0, 0)));
    let real = Flow { source: Ipv4Addr::new(198, 51, 100, 7), ..shown };
    let nothing = policy(&[], &[]);
    assert!(!said(&mut table, &friend, "> A 71 91", 0));
    assert!(table.admit_as(&friend, &real, &shown, 0));
    assert!(said(&mut table, &nothing, "> A 71 91", 0));
    // It is one of those that nothing takes the place of, each way.
    check(&mut table, &nothing, 1000, &["> A 71 91", "< A 91 75", "- > S 7"]);
    check(&mut table, &nothing, 1000, &["< R 3", "> A 75 91", "< R 91", "> A 75 91"]);
    assert!(!said(&mut table, &nothing, "> A 75 91", 1031), "it was reset");
}
