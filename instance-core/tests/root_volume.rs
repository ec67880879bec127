//! Which volume is the root volume: what is attached at the root device, by whatever name that is called.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::Duration;

use common::{ask, check, launch, open, refused, world};
use instance_core::{ErrorKind, Instance, InstanceState, LaunchSpec, VolumeSpec};

const STATE: (ErrorKind, &str) = (ErrorKind::IncorrectInstanceState, "IncorrectInstanceState");

#[test]
fn an_instance_boots_its_root_volume_or_nothing() {
    let (dir, region, ami) = world();
    let server = launch(&region, &ami).unwrap();
    ask(&server, "write 0 0 root", "wrote");
    ask(&server, "write 1 0 data", "wrote");
    server.stop(Duration::ZERO).unwrap();
    let root = server.describe().attachments[0].volume_id;
    region.detach_volume(root).unwrap();
    // What is left is at /dev/sdf.
    let bare = |server: &Instance| {
        check(&server.start().unwrap_err(), STATE.0, STATE.1, &["no volume", "/dev/xvda"]);
        assert_eq!(server.state(), InstanceState::Stopped);
        refused(server.create_image("rootless"), STATE.0, STATE.1);
    };
    bare(&server);
    assert_eq!(region.used_capacity(), (0, 0));
    let id = server.id();
    drop((server, region));
    let region = open(dir.path());
    let server = region.instance(id).unwrap();
    bare(&server);

    for alias in ["/dev/sda1", "/dev/sda", "xvda", "/dev/xvda"] {
        region.attach_volume(root, id, alias).unwrap();
        let taken = region.create_volume(VolumeSpec::new(1)).unwrap().id;
        let refusal = region.attach_volume(taken, id, "/dev/sda");
        refused(refusal, ErrorKind::InvalidParameter, "InvalidParameterValue");
        region.delete_volume(taken).unwrap();
        let attached = server.describe().attachments;
        assert_eq!((attached.len(), attached[0].volume_id), (2, root), "{alias}");
        assert_eq!(attached[0].device_name, "/dev/xvda", "{alias}");
        server.start().unwrap();
        assert_eq!(ask(&server, "read 0 0", "data"), "root", "{alias}");
        assert_eq!(ask(&server, "read 1 0", "data"), "data", "{alias}");
        let held = region.detach_volume(root);
        refused(held, ErrorKind::OperationNotPermitted, "OperationNotPermitted");
        server.stop(Duration::ZERO).unwrap();
        let image = server.create_image(format!("by {alias}").as_str()).unwrap().ami;
        assert_eq!(image.manifest().root_device_name().as_str(), "/dev/xvda");
        let child = region.launch(&image, spec()).unwrap();
        assert_eq!(ask(&child, "read 0 0", "data"), "root", "{alias}");
        child.terminate().unwrap();
        region.detach_volume(root).unwrap();
    }
}

fn spec() -> LaunchSpec {
    LaunchSpec::new("t2.nano".parse().unwrap())
}
