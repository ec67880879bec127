//! EC2's calls on images, made by several accounts: who sees, launches, copies and changes what.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use ami_core::{
    AccountId, Action, Ami, AmiId, BlockDeviceMapping, Catalog, CatalogExt, DescribeImages, Digest, Error,
    ErrorKind, Filter, Grantee, Image, ImageState, MemoryCatalog, ModifyImageAttribute, OwnerAlias,
    ProductCode, ProductCodeKind, Timestamp, X86_64,
};

const OWNER: &str = "111111111111";
const FRIEND: &str = "222222222222";
const STRANGER: &str = "333333333333";

fn account(text: &str) -> AccountId {
    text.parse().unwrap()
}

fn image(name: &str, owner: &str) -> Image {
    let ami = Ami::<X86_64>::builder(name)
        .root_device("/dev/xvda")
        .block_device(BlockDeviceMapping::ebs("/dev/xvda", Digest::of(b"root"), 8))
        .created("2025-06-01T12:00:00Z".parse().unwrap())
        .build(&"us-east-1".parse().unwrap(), &account(owner));
    Image::new(ami.unwrap())
}

/// Owner's images, one for each way to share, and one of Amazon's.
struct World {
    catalog: MemoryCatalog,
    names: Vec<(AmiId, &'static str)>,
}

impl World {
    fn new() -> Self {
        let mut world = Self { catalog: MemoryCatalog::new(), names: Vec::new() };
        world.put("private", OWNER, |_| ());
        world.put("shared", OWNER, |i| assert!(i.launch_permissions_mut().add(account(FRIEND))));
        world.put("public", OWNER, |i| i.launch_permissions_mut().set_public(true));
        world.put("disabled", OWNER, |i| i.set_state(ImageState::Disabled).unwrap());
        world.put("invalid", OWNER, |i| {
            i.launch_permissions_mut().set_public(true);
            i.set_state(ImageState::Invalid).unwrap();
        });
        world.put("deprecated", OWNER, |i| {
            i.launch_permissions_mut().set_public(true);
            i.set_deprecation(Some("2020-01-01T00:00:00Z".parse().unwrap()));
        });
        world.put("linux", STRANGER, |i| {
            i.launch_permissions_mut().set_public(true);
            i.set_owner_alias(Some(OwnerAlias::Amazon));
        });
        world.put("sold", STRANGER, |i| {
            i.launch_permissions_mut().set_public(true);
            let code = ProductCode { id: "8vk2x".to_owned(), kind: ProductCodeKind::Marketplace };
            i.add_product_code(code).unwrap();
        });
        world
    }

    fn put(&mut self, name: &'static str, owner: &str, change: impl FnOnce(&mut Image)) {
        let mut image = image(name, owner);
        change(&mut image);
        self.names.push((image.id(), name));
        self.catalog.put(image).unwrap();
    }

    fn id(&self, name: &str) -> AmiId {
        self.names.iter().find(|(_, known)| *known == name).unwrap().0
    }

    /// The names that an account is told, in alphabetical order.
    fn told(&self, who: &str, request: &DescribeImages) -> Result<Vec<String>, Error> {
        let page = self.catalog.as_account(account(who)).describe(request)?;
        let mut names: Vec<String> = page.items.iter().map(|i| i.ami().name().to_owned()).collect();
        names.sort_unstable();
        Ok(names)
    }
}

#[test]
fn an_account_is_told_of_what_it_may_launch_and_asks_for() {
    let world = World::new();
    let all = DescribeImages::new;
    let name = |name: &str| Filter::new("name", [name]).unwrap();
    let table: [(&str, DescribeImages, &[&str]); 20] = [
        (OWNER, all(), &["deprecated", "invalid", "linux", "private", "public", "shared", "sold"]),
        (
            OWNER,
            all().include_disabled(true).owner("self".parse().unwrap()),
            &["deprecated", "disabled", "invalid", "private", "public", "shared"],
        ),
        (FRIEND, all(), &["linux", "public", "shared", "sold"]),
        (FRIEND, all().include_disabled(true), &["linux", "public", "shared", "sold"]),
        (FRIEND, all().include_deprecated(true), &["deprecated", "linux", "public", "shared", "sold"]),
        (FRIEND, all().id(world.id("deprecated")), &["deprecated"]),
        (FRIEND, all().id(world.id("deprecated")).filter(name("p*")), &[]),
        (STRANGER, all(), &["linux", "public", "sold"]),
        (STRANGER, all().owner("self".parse().unwrap()), &["linux", "sold"]),
        (FRIEND, all().owner("self".parse().unwrap()), &[]),
        (FRIEND, all().owner("amazon".parse().unwrap()), &["linux"]),
        (FRIEND, all().owner(account(OWNER).into()), &["public", "shared"]),
        (
            FRIEND,
            all().owner("amazon".parse().unwrap()).owner(account(OWNER).into()),
            &["linux", "public", "shared"],
        ),
        (FRIEND, all().executable_by("self".parse().unwrap()), &["shared"]),
        (STRANGER, all().executable_by("self".parse().unwrap()), &[]),
        (OWNER, all().executable_by(FRIEND.parse().unwrap()), &["shared"]),
        (FRIEND, all().executable_by("all".parse().unwrap()), &["linux", "public", "sold"]),
        (FRIEND, all().filter(name("p*")), &["public"]),
        (OWNER, all().filter(name("p*")).filter(name("*e")), &["private"]),
        (OWNER, all().id(world.id("private")).id(world.id("linux")), &["linux", "private"]),
    ];
    for (row, (who, request, expected)) in table.into_iter().enumerate() {
        assert_eq!(world.told(who, &request).unwrap(), expected, "row {row}: {request:?}");
    }
}

#[test]
fn who_may_not_is_told_so_under_ec2s_code() {
    let world = World::new();
    let refused = |who: &str, name: &str, action: Action| {
        let images = world.catalog.as_account(account(who));
        images.authorized(&world.id(name), action).err().map_or("", |e| e.code())
    };
    let (missing, not_yours, unavailable) =
        ("InvalidAMIID.NotFound", "AuthFailure", "InvalidAMIID.Unavailable");
    let table = [
        // Who, what: see, launch, copy, change.
        (OWNER, "private", ["", "", "", ""]),
        (FRIEND, "private", [missing, not_yours, not_yours, missing]),
        (FRIEND, "shared", ["", "", "", not_yours]),
        (STRANGER, "shared", [missing, not_yours, not_yours, missing]),
        (STRANGER, "public", ["", "", "", not_yours]),
        (FRIEND, "deprecated", ["", "", "", not_yours]),
        (FRIEND, "sold", ["", "", not_yours, not_yours]),
        (STRANGER, "sold", ["", "", "", ""]),
        (FRIEND, "invalid", [missing, unavailable, unavailable, missing]),
        (OWNER, "disabled", ["", unavailable, unavailable, ""]),
        (FRIEND, "disabled", [missing, not_yours, not_yours, missing]),
    ];
    for (who, name, expected) in table {
        let actions = [Action::See, Action::Launch, Action::Copy, Action::Change];
        assert_eq!(actions.map(|action| refused(who, name, action)), expected, "{who} {name}");
    }
    // Every call that changes asks.
    let (theirs, id) = (world.catalog.as_account(account(FRIEND)), world.id("shared"));
    let change = ModifyImageAttribute::new().description("mine now");
    let calls = [
        theirs.modify(&id, &change),
        theirs.enable(&id),
        theirs.disable(&id),
        theirs.enable_deprecation(&id, None),
        theirs.disable_deprecation(&id),
        theirs.deregister(&id),
    ];
    for (call, refused) in calls.into_iter().enumerate() {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::AuthFailure, "call {call}");
    }
    assert_eq!(world.catalog.get(&id).unwrap().description(), "");
}

#[test]
fn permissions_are_given_and_taken_by_their_owner() {
    let world = World::new();
    let (mine, id) = (world.catalog.as_account(account(OWNER)), world.id("private"));
    let friend = Grantee::Account(account(FRIEND));
    let sees = |who: &str| world.catalog.as_account(account(who)).get(&id).is_ok();
    let new = ModifyImageAttribute::new;
    let table = [
        (new().add_launch_permission(friend), [true, false]),
        (new().add_launch_permission(Grantee::All), [true, true]),
        (new().remove_launch_permission(friend), [true, true]),
        (new().remove_launch_permission(Grantee::All), [false, false]),
        (new().remove_launch_permission(Grantee::All), [false, false]),
        (new().add_launch_permission(friend).add_launch_permission(Grantee::All), [true, true]),
        (new().reset_launch_permission(), [false, false]),
        (new().reset_launch_permission().add_launch_permission(friend), [true, false]),
    ];
    for (change, expected) in table {
        mine.modify(&id, &change).unwrap();
        assert_eq!([FRIEND, STRANGER].map(sees), expected, "{change:?}");
    }
    let before = world.catalog.get(&id).unwrap();
    let long = "x".repeat(Image::MAX_DESCRIPTION + 1);
    let both = new().add_launch_permission(friend).remove_launch_permission(friend);
    let refused = [
        (new(), ErrorKind::MissingParameter),
        (both, ErrorKind::InvalidParameterCombination),
        (new().description(long).add_launch_permission(Grantee::All), ErrorKind::InvalidParameterValue),
    ];
    for (change, kind) in refused {
        assert_eq!(mine.modify(&id, &change).unwrap_err().kind(), kind);
    }
    assert_eq!(world.catalog.get(&id).unwrap(), before, "all or nothing");
}

#[test]
fn a_disabled_image_is_its_owners_alone() {
    let world = World::new();
    let (mine, id) = (world.catalog.as_account(account(OWNER)), world.id("shared"));
    let disabled = mine.disable(&id).unwrap();
    assert_eq!((disabled.state(), disabled.launch_permissions().accounts().len()), (ImageState::Disabled, 0));
    assert_eq!(mine.disable(&id).unwrap_err().code(), "IncorrectState");
    let share = ModifyImageAttribute::new().add_launch_permission(Grantee::All);
    assert_eq!(mine.modify(&id, &share).unwrap_err().code(), "InvalidAMIID.Unavailable");
    mine.modify(&id, &ModifyImageAttribute::new().description("set aside")).unwrap();
    assert_eq!(mine.enable(&id).unwrap().state(), ImageState::Available);
    assert_eq!(mine.enable(&id).unwrap_err().code(), "IncorrectState");
    mine.modify(&id, &share).unwrap();
}

#[test]
fn a_deprecation_begins_at_a_full_minute_ahead() {
    let world = World::new();
    let time = |text: &str| -> Timestamp { text.parse().unwrap() };
    let now = time("2026-01-31T12:00:00Z");
    let (mine, id) = (world.catalog.as_account(account(OWNER)).at(now), world.id("public"));
    for (name, asked, expected) in [
        ("private", "2026-01-31T12:00:00Z", Some("2026-01-31T12:00:00Z")),
        ("private", "2026-02-01T12:00:29.999Z", Some("2026-02-01T12:00:00Z")),
        ("private", "2026-02-01T12:00:30Z", Some("2026-02-01T12:01:00Z")),
        ("private", "2036-01-30T12:00:00Z", Some("2036-01-30T12:00:00Z")),
        ("private", "2026-01-31T11:59:59.999Z", None),
        ("private", "2036-03-01T12:00:00Z", None),
        // One that is public, within two years of when it was made.
        ("public", "2027-06-01T12:00:00Z", Some("2027-06-01T12:00:00Z")),
        ("public", "2027-06-04T12:00:00Z", None),
        ("shared", "2027-06-04T12:00:00Z", Some("2027-06-04T12:00:00Z")),
    ] {
        let image = mine.enable_deprecation(&world.id(name), Some(time(asked)));
        match expected {
            Some(expected) => assert_eq!(image.unwrap().deprecation(), Some(time(expected)), "{asked}"),
            None => assert_eq!(image.unwrap_err().kind(), ErrorKind::InvalidParameterValue, "{asked}"),
        }
    }
    mine.enable_deprecation(&id, None).unwrap();
    let theirs = world.catalog.as_account(account(FRIEND)).at(now);
    let found = |request: DescribeImages| theirs.describe(&request).unwrap().items.len();
    let named = || DescribeImages::new().filter(Filter::new("name", ["public"]).unwrap());
    assert_eq!(found(named()), 0);
    assert_eq!(found(named().include_deprecated(true)), 1);
    assert_eq!(found(DescribeImages::new().id(id)), 1, "who knows its id is told of it");
    theirs.authorized(&id, Action::Launch).unwrap();
    // However old it is.
    let years_later = world.catalog.as_account(account(OWNER)).at(time("2030-01-31T12:00:00Z"));
    years_later.enable_deprecation(&id, None).unwrap();
    mine.disable_deprecation(&id).unwrap();
    assert_eq!(found(named()), 1);
}

#[test]
fn pages_hold_every_image_once() {
    let mut world = World::new();
    let names: Vec<String> = (0..23).map(|n| format!("page-{n}")).collect();
    for name in names {
        world.put(name.leak(), OWNER, |_| ());
    }
    let mine = world.catalog.as_account(account(OWNER));
    let whole = mine.describe(&DescribeImages::new()).unwrap();
    assert_eq!(whole.next_token, None);
    for size in [1, 2, 7, 29, 30, 1000] {
        let (mut found, mut request) = (Vec::new(), DescribeImages::new().max_results(size));
        loop {
            let page = mine.describe(&request).unwrap();
            assert!(page.items.len() <= size);
            found.extend(page.items);
            match page.next_token {
                Some(token) => request = request.next_token(token),
                None => break,
            }
        }
        assert_eq!(found, whole.items, "pages of {size}");
    }
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let world = World::new();
    let absent = image("absent", OWNER).id();
    let all = DescribeImages::new;
    let table = [
        (all().id(absent), "InvalidAMIID.NotFound"),
        (all().id(world.id("disabled")), "InvalidAMIID.NotFound"),
        (all().max_results(0), "InvalidParameterValue"),
        (all().max_results(1001), "InvalidParameterValue"),
        (all().id(world.id("public")).max_results(5), "InvalidParameterCombination"),
        (all().next_token("no token"), "InvalidNextToken"),
        (all().next_token("abcd"), "InvalidNextToken"),
    ];
    for (request, code) in table {
        assert_eq!(world.told(FRIEND, &request).unwrap_err().code(), code, "{request:?}");
    }
}
