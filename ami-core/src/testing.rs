//! For tests: the conformance suite of [`Catalog`].

use std::collections::BTreeMap;
use std::thread;

use crate::{
    AccountId, Ami, AmiId, AnyAmi, Arm64, BlockDeviceMapping, Catalog, CatalogExt, Digest, Error, ErrorKind,
    Filter, Image, ImageState, ImdsSupport, Query, RegionName, SourceImage, StateReason, Timestamp, X86_64,
};

/// Checks that the catalogs that `empty` makes keep the contract of [`Catalog`].
///
/// `empty` gives a new catalog without images whenever it is called. Some checks call the catalog
/// from several threads.
///
/// ```
/// use ami_core::{MemoryCatalog, testing::catalog_conformance};
///
/// catalog_conformance(MemoryCatalog::new);
/// ```
///
/// # Panics
///
/// Where the contract is broken, with what was expected.
pub fn catalog_conformance<C: Catalog>(empty: impl Fn() -> C) {
    an_image_comes_back_as_it_was_put(&empty());
    what_is_not_there_is_not_found(&empty());
    names_are_taken_per_owner_and_region(&empty());
    an_update_needs_the_record_that_is_kept(&empty());
    a_list_is_what_the_query_selects(&empty());
    any_sequence_of_calls_does_what_the_contract_says(&empty());
    one_of_many_gets_the_name(&empty());
    no_change_is_lost_between_threads(&empty());
}

fn an_image_comes_back_as_it_was_put(catalog: &impl Catalog) {
    let mut image = Image::pending(sample("us-east-1", 1, "full", 0));
    must(image.tags_mut().insert("stage", "production"));
    must(image.set_description("with every attribute"));
    image.set_deprecation(Some(Timestamp::MAX));
    image.launch_permissions_mut().add(account(2));
    image.set_imds_support(ImdsSupport::V2_0);
    let source = SourceImage { region: must("eu-west-1".parse()), id: image.id() };
    image.set_source(Some(source), "i-0123456789abcdef0".parse().ok());
    image.set_snapshots("snap-0123456789abcdef0".parse());
    image.set_state_reason(Some(StateReason::new("Server.InternalError", "not yet")));
    must(catalog.put(image.clone()));
    let kept = must(catalog.get(&image.id()));
    assert_eq!(kept, image);
    assert_eq!(kept.ami().created(), image.ami().created(), "the time of creation is kept");
    assert_eq!(must(catalog.remove(&image.id())), image, "remove gives the last record");
    expect(catalog.get(&image.id()), ErrorKind::NotFound, "get after remove");
    expect(catalog.put(image.clone()), ErrorKind::DuplicateName, "put after remove");
    expect(catalog.get(&image.id()), ErrorKind::NotFound, "the put that failed has changed nothing");
    let next = image.with_incarnation(1);
    must(catalog.put(next.clone()));
    assert_eq!(must(catalog.get(&next.id())), next);
}

fn what_is_not_there_is_not_found(catalog: &impl Catalog) {
    must(catalog.put(Image::new(sample("us-east-1", 1, "other", 0))));
    let absent = Image::new(sample("us-east-1", 1, "absent", 0));
    expect(catalog.get(&absent.id()), ErrorKind::NotFound, "get");
    expect(catalog.remove(&absent.id()), ErrorKind::NotFound, "remove");
    expect(catalog.update(&absent, absent.clone()), ErrorKind::NotFound, "update");
    assert_eq!(must(catalog.list(&Query::all())).len(), 1, "a call that failed has changed nothing");
}

fn names_are_taken_per_owner_and_region(catalog: &impl Catalog) {
    let first = Image::new(sample("us-east-1", 1, "web", 0));
    must(catalog.put(first.clone()));
    expect(catalog.put(first.clone()), ErrorKind::DuplicateName, "put of the very image");
    let second = Image::new(sample("us-east-1", 1, "web", 1));
    expect(catalog.put(second.clone()), ErrorKind::DuplicateName, "put of another image of that name");
    must(catalog.put(Image::new(sample("eu-west-1", 1, "web", 0))));
    must(catalog.put(Image::new(sample("us-east-1", 2, "web", 0))));
    must(catalog.put(Image::new(sample("us-east-1", 1, "Web", 0))));

    must(catalog.modify(&first.id(), |image| image.set_state(ImageState::Deregistered)));
    must(catalog.put(second.clone()));
    let gone = must(catalog.get(&first.id()));
    expect(
        catalog.update(&gone, first),
        ErrorKind::DuplicateName,
        "a deregistered image back under a taken name",
    );
    assert_eq!(must(catalog.get(&gone.id())), gone, "the update that failed has changed nothing");
}

fn an_update_needs_the_record_that_is_kept(catalog: &impl Catalog) {
    let first = Image::new(sample("us-east-1", 1, "web", 0));
    must(catalog.put(first.clone()));
    let mut second = first.clone();
    must(second.set_description("second"));
    must(catalog.update(&first, second.clone()));
    let mut third = first.clone();
    must(third.set_description("third"));
    expect(catalog.update(&first, third.clone()), ErrorKind::Conflict, "update of a stale record");
    assert_eq!(must(catalog.get(&first.id())), second);

    let other = Image::new(sample("us-east-1", 1, "other", 0));
    expect(catalog.update(&second, other), ErrorKind::InvalidParameterValue, "update to another image");
    let other_time = Image::new(at("us-east-1", 1, "web", 0, Timestamp::MAX));
    expect(
        catalog.update(&second, other_time),
        ErrorKind::InvalidParameterValue,
        "update of the creation time",
    );
    must(catalog.update(&second, third.clone()));
    assert_eq!(must(catalog.get(&first.id())), third);
}

fn a_list_is_what_the_query_selects(catalog: &impl Catalog) {
    let mut images = Vec::new();
    for number in 0..12 {
        let region = ["us-east-1", "eu-west-1"][number % 2];
        let mut image =
            Image::new(sample(region, number as u64 % 3, &format!("image-{number}"), number as u8));
        image.launch_permissions_mut().set_public(number % 4 == 0);
        must(image.tags_mut().insert("number", number.to_string()));
        must(catalog.put(image.clone()));
        images.push(image);
    }
    images.sort_by_key(Image::id);
    let filter = |name: &str, value: &str| Query::all().filter(must(Filter::new(name, [value])));
    let queries = [
        Query::all(),
        Query::all().limit(0),
        Query::all().limit(5),
        Query::all().after(images[3].id()).limit(4),
        Query::all().id(images[7].id()).id(images[2].id()),
        Query::all().owner(account(1)),
        Query::all().visible_to(account(2)),
        filter("name", "image-1*"),
        filter("tag:number", "?"),
        filter("architecture", "arm64").owner(account(0)),
    ];
    for query in queries {
        assert_eq!(must(catalog.list(&query)), query.select(&images), "{query:?}");
    }
}

/// Some hundred calls in a fixed order that looks random, each compared with a list kept beside.
fn any_sequence_of_calls_does_what_the_contract_says(catalog: &impl Catalog) {
    let mut model: Vec<Image> = Vec::new();
    // How many there were of each that are gone.
    let mut gone: BTreeMap<AmiId, u64> = BTreeMap::new();
    let mut seed = 1_u32;
    let mut random = |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 16) % below
    };
    for step in 0..400 {
        let name = ["alpha", "beta", "gamma"][random(3) as usize];
        let image = Image::new(sample("us-east-1", 1, name, random(3) as u8));
        let used = gone.get(&image.id()).copied().unwrap_or(0);
        // The next of its kind, or now and then one that was there.
        let image = image.with_incarnation(if random(4) == 0 { used / 2 } else { used });
        let place = model.iter().position(|kept| kept.id() == image.id());
        let not_found = if place.is_some() { None } else { Some(ErrorKind::NotFound) };
        match random(5) {
            0 | 1 => {
                let holds =
                    |kept: &Image| kept.ami().name() == name && kept.state() != ImageState::Deregistered;
                let taken = place.is_some() || image.ami().incarnation() < used || model.iter().any(holds);
                let failure = taken.then_some(ErrorKind::DuplicateName);
                assert_eq!(kind(&catalog.put(image.clone())), failure, "put in step {step}");
                if !taken {
                    model.push(image);
                }
            }
            2 => {
                assert_eq!(kind(&catalog.remove(&image.id())), not_found, "remove in step {step}");
                if let Some(place) = place {
                    model.remove(place);
                    gone.insert(image.ami().with_incarnation(0).id(), used + 1);
                }
            }
            3 => {
                let describe = |image: &mut Image| image.set_description(step.to_string());
                let changed = catalog.modify(&image.id(), describe);
                assert_eq!(kind(&changed), not_found, "describe in step {step}");
                if let Some(place) = place {
                    must(describe(&mut model[place]));
                }
            }
            _ => {
                let deregister = |image: &mut Image| image.set_state(ImageState::Deregistered);
                let changed = catalog.modify(&image.id(), deregister);
                let failure = match place {
                    Some(place) => kind(&deregister(&mut model[place])),
                    None => not_found,
                };
                assert_eq!(kind(&changed), failure, "deregister in step {step}");
            }
        }
        assert_eq!(must(catalog.list(&Query::all())), Query::all().select(&model), "list after step {step}");
    }
}

fn one_of_many_gets_the_name(catalog: &impl Catalog) {
    let won: Vec<Image> = thread::scope(|scope| {
        let put = |content| {
            let image = Image::new(sample("us-east-1", 1, "wanted", content));
            match catalog.put(image.clone()) {
                Ok(()) => Some(image),
                Err(err) => {
                    assert_eq!(err.kind(), ErrorKind::DuplicateName);
                    None
                }
            }
        };
        let threads: Vec<_> = (0..8).map(|content| scope.spawn(move || put(content))).collect();
        threads
            .into_iter()
            .filter_map(|thread| thread.join().expect("a thread that puts ends well"))
            .collect()
    });
    assert_eq!(won.len(), 1, "one image gets the name");
    assert_eq!(must(catalog.list(&Query::all())), won);
}

fn no_change_is_lost_between_threads(catalog: &impl Catalog) {
    const THREADS: usize = 4;
    const CHANGES: usize = 25;
    let image = Image::new(sample("us-east-1", 1, "counter", 0));
    must(catalog.put(image.clone()));
    let count = |image: &Image| image.description().parse().unwrap_or(0_usize);
    let increment = |image: &mut Image| image.set_description((count(image) + 1).to_string());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| (0..CHANGES).for_each(|_| drop(must(catalog.modify(&image.id(), increment)))));
        }
    });
    assert_eq!(count(&must(catalog.get(&image.id()))), THREADS * CHANGES, "every change has happened");
}

fn account(number: u64) -> AccountId {
    must(format!("{number:012}").parse())
}

fn sample(region: &str, owner: u64, name: &str, content: u8) -> AnyAmi {
    let millis = 1_769_860_800_000 + u64::from(content);
    at(region, owner, name, content, Timestamp::from_unix_millis(millis).unwrap_or(Timestamp::MIN))
}

/// An image whose content depends on `content`, and its architecture too.
fn at(region: &str, owner: u64, name: &str, content: u8, created: Timestamp) -> AnyAmi {
    let root = BlockDeviceMapping::ebs("/dev/xvda", Digest::of(&[content]), 8);
    let (region, owner): (RegionName, _) = (must(region.parse()), account(owner));
    if content % 2 == 0 {
        let builder = Ami::<X86_64>::builder(name).root_device("/dev/xvda").block_device(root);
        must(builder.created(created).build(&region, &owner)).into()
    } else {
        let builder = Ami::<Arm64>::builder(name).root_device("/dev/xvda").block_device(root);
        must(builder.created(created).build(&region, &owner)).into()
    }
}

fn must<T>(result: Result<T, Error>) -> T {
    result.unwrap_or_else(|err| panic!("unexpected {:?}: {err}", err.kind()))
}

fn kind<T>(result: &Result<T, Error>) -> Option<ErrorKind> {
    result.as_ref().err().map(Error::kind)
}

fn expect<T>(result: Result<T, Error>, expected: ErrorKind, what: &str) {
    assert_eq!(kind(&result), Some(expected), "{what}");
}
