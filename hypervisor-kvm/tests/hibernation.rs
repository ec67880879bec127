//! Instances on KVM hibernate and go on in a region that was closed meanwhile.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ami_core::{Ami, X86};
use common::soon;
use hypervisor_kvm::{Kvm, Transport};
use instance_core::machine::Hypervisor;
use instance_core::{
    BlockDeviceMappingRequest, DirectBoot, ImageSource, Instance, LaunchSpec, Region, RegionOptions,
};
use storage_block::MemoryDisk;
use storage_block::keys::LocalKey;

fn ask(instance: &Instance, line: &str, answer: &str) {
    let mut reader = instance.console().reader_from_now();
    instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
    reader.wait_for(answer, soon()).unwrap_or_else(|e| panic!("{line}: {e}"));
}

/// Has the guest's agent say what it is told, by a stream.
fn echo(instance: &Instance) {
    let mut stream = instance.vsock().unwrap().connect(7, soon()).unwrap();
    stream.set_deadline(Some(soon()));
    stream.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
}

fn open(dir: &Path, kvm: &Kvm, key: Option<&Arc<LocalKey>>) -> Region<Kvm> {
    let options = match key {
        Some(key) => RegionOptions::new().keys(key.clone()),
        None => RegionOptions::new(),
    };
    options.vsock(true).open(dir, kvm.clone()).unwrap()
}

#[test]
fn an_instance_goes_on_with_its_memory_and_its_disk() {
    let Some(kvm) = common::kvm() else { return };
    if !kvm.capabilities().save {
        return eprintln!("SKIPPED: this host's KVM does not tell all of a machine's state");
    }
    let kernel = common::guest::elf().unwrap().to_vec();
    for (transport, encrypted) in [(Transport::Mmio, false), (Transport::Pci, false), (Transport::Mmio, true)]
    {
        let kvm = kvm.clone().with_transport(transport);
        let dir = tempfile::tempdir().unwrap();
        let key = encrypted.then(|| Arc::new(LocalKey::generate().unwrap()));
        let region = open(dir.path(), &kvm, key.as_ref());
        let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
        let source = ImageSource::new(&disk).boot(DirectBoot::new(kernel.clone(), None, ""));
        let ami = region.register_image(Ami::<X86>::builder("bare"), source).unwrap();
        let root = BlockDeviceMappingRequest::new("/dev/xvda").size_gib(1).encrypted(encrypted);
        let spec = LaunchSpec::new("t2.nano".parse().unwrap()).hibernation(true).block_device(root);
        let instance = region.launch(&ami, spec).unwrap();
        ask(&instance, "remember thought", "remembered");
        // The bare-metal guest has drivers for devices on virtio-mmio alone.
        let has_disk = transport == Transport::Mmio;
        if has_disk {
            ask(&instance, "write 0 1 word", "wrote");
            ask(&instance, "cid", "cid 3");
            echo(&instance);
        }
        instance.hibernate(Duration::ZERO).unwrap();
        let asleep = instance.describe().state_reason.unwrap();
        assert_eq!(asleep.code, "Client.UserInitiatedHibernate", "{asleep}");
        let id = instance.id();
        drop((instance, region));

        let region = open(dir.path(), &kvm, key.as_ref());
        let instance = region.instance(id).unwrap();
        instance.start().unwrap();
        assert_eq!(instance.describe().state_reason, None);
        ask(&instance, "recall", "recalled thought");
        if has_disk {
            ask(&instance, "read 0 1", "data word");
            ask(&instance, "write 0 1 more", "wrote");
            ask(&instance, "read 0 1", "data more");
            echo(&instance);
        }
    }
}
