//! The limits of launch templates, which it takes too many calls to reach.

use super::version::VersionRecord;
use super::*;
use crate::testing::FakeHypervisor;
use crate::{LaunchSpec, Region};

#[test]
fn an_account_has_so_many_templates_and_one_of_them_so_many_versions() {
    let dir = tempfile::tempdir().unwrap();
    let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
    let spec = || LaunchSpec::new("t2.nano".parse().unwrap());
    let create = |name: &str| region.create_launch_template(name, spec());
    let first = create("first").unwrap();
    let other = |n: usize| {
        let id = LaunchTemplateId::from_bytes(((n as u128) << 64).to_be_bytes());
        let template = LaunchTemplate { id, name: format!("other-{n}"), ..first.clone() };
        LaunchTemplateRecord { template, versions_made: 1 }
    };
    let store = &region.inner.store;
    store.commit(|c| (2..LaunchTemplate::MAX).try_for_each(|n| c.put(&other(n)))).unwrap();
    create("the-last").unwrap();
    let more = create("one-more").unwrap_err();
    let expected = (ErrorKind::MaxTemplateLimitExceeded, "MaxTemplateLimitExceeded");
    assert_eq!((more.kind(), more.code()), expected);
    let another = region.as_account("222222222222".parse().unwrap());
    another.create_launch_template("one-more", spec()).unwrap();
    region.delete_launch_template("the-last").unwrap();
    create("one-more").unwrap();

    let made = LaunchTemplate::MAX_VERSIONS as u64 - 1;
    let version = |version| VersionRecord {
        template_id: first.id,
        version,
        description: String::new(),
        create_time: first.create_time,
        data: spec(),
    };
    let record = LaunchTemplateRecord { template: first.clone(), versions_made: made };
    store
        .commit(|c| {
            (2..=made).try_for_each(|n| c.put(&version(n)))?;
            c.put(&record)
        })
        .unwrap();
    let create = || region.create_launch_template_version("first", spec());
    assert_eq!(create().unwrap().version, made + 1);
    let more = create().unwrap_err();
    let expected = (ErrorKind::MaxTemplateVersionLimitExceeded, "MaxTemplateVersionLimitExceeded");
    assert_eq!((more.kind(), more.code()), expected);
    region.create_launch_template_version("one-more", spec()).unwrap();
}
