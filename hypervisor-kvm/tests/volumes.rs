//! Volumes come to instances that run, and go, on KVM as it comes.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::Instant;

use ami_core::{Ami, Arch, VolumeId, X86, X86_64};
use common::{linux, soon};
use hypervisor_kvm::Kvm;
use instance_core::console::ConsoleReader;
use instance_core::machine::{Hypervisor, Runs};
use instance_core::{
    DescribeVolumes, DirectBoot, ErrorKind, ImageSource, Instance, LaunchSpec, Region, VolumeSpec,
    VolumeState,
};
use storage_block::MemoryDisk;

const SECTOR: usize = 512;

/// An instance whose guest is up, and what it says.
struct Guest {
    instance: Instance,
    console: ConsoleReader,
}

impl Guest {
    fn launch<A: Arch>(region: &Region<Kvm>, boot: DirectBoot) -> Self
    where
        Kvm: Runs<A>,
    {
        let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
        let source = ImageSource::new(&disk).boot(boot);
        let ami = region.register_image(Ami::<A>::builder("guest"), source).unwrap();
        let instance = region.launch(&ami, LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
        let mut console = instance.console().reader();
        console.wait_for("GUEST READY", soon()).unwrap();
        console.wait_for("\n", soon()).unwrap();
        Self { instance, console }
    }

    /// Whether that is the answer.
    fn answers(&mut self, line: &str, answer: &str) -> bool {
        self.instance.console().write_all(format!("{line}\n").as_bytes(), soon()).unwrap();
        let kind = answer.split(' ').next().unwrap();
        loop {
            let heard = self.console.wait_for("\n", soon()).unwrap_or_else(|e| panic!("{line}: {e}"));
            let heard = String::from_utf8_lossy(&heard).trim().to_owned();
            // A terminal may echo the command before the answer.
            if heard != line && heard.starts_with(kind) {
                return heard == answer;
            }
        }
    }

    fn until_it_has(&mut self, disks: u32) {
        let deadline = soon();
        while !self.answers("disks", &format!("disks {disks}")) {
            assert!(Instant::now() < deadline, "the guest does not see {disks} disks");
        }
    }
}

fn state(region: &Region<Kvm>, id: VolumeId) -> VolumeState {
    let all = region.describe_volumes(&DescribeVolumes::new()).unwrap().items;
    all.iter().find(|volume| volume.id == id).unwrap().state
}

/// A guest that takes no notice: what the region and the machine do by themselves.
#[test]
fn a_volume_comes_to_an_instance_that_runs_and_is_taken_by_force() {
    let Some(kvm) = common::kvm_as_it_comes() else { return };
    let dir = tempfile::tempdir().unwrap();
    let region = Region::open(dir.path(), kvm).unwrap();
    let kernel = common::guest::elf().unwrap().to_vec();
    let Guest { instance, .. } = Guest::launch::<X86>(&region, DirectBoot::new(kernel, None, ""));
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    for _ in 0..2 {
        region.attach_volume(volume, instance.id(), "/dev/sdf").unwrap();
        assert_eq!(state(&region, volume), VolumeState::InUse);
        assert_eq!(region.volume_disk(volume).unwrap_err().kind(), ErrorKind::VolumeInUse);
        region.force_detach_volume(volume).unwrap();
        assert_eq!(state(&region, volume), VolumeState::Available);
    }
    region.attach_volume(volume, instance.id(), "/dev/sdf").unwrap();
    instance.terminate().unwrap();
    region.delete_volume(volume).unwrap();
}

/// A stock Linux, which finds it, writes to it and lets go of it.
#[test]
fn a_guest_takes_up_a_volume_as_it_runs_and_lets_go_of_it() {
    let Some(kvm) = common::kvm_as_it_comes() else { return };
    if !kvm.execution().unwrap().is_hardware() {
        let why = "this host's KVM emulates guest kernels; `cargo xtask test` runs this in the lab";
        assert!(std::env::var_os("AMI_LAB").is_none(), "{why}");
        return eprintln!("SKIPPED: {why}");
    }
    let dir = tempfile::tempdir().unwrap();
    let region = Region::open(dir.path(), kvm).unwrap();
    let [kernel, initrd] =
        ["vmlinuz", "conformance.img"].map(|name| std::fs::read(linux::directory().join("amd64").join(name)));
    let boot = DirectBoot::new(kernel.unwrap(), Some(initrd.unwrap()), "console=ttyS0 quiet panic=-1");
    let mut guest = Guest::launch::<X86_64>(&region, boot);
    guest.until_it_has(1);
    let volume = region.create_volume(VolumeSpec::new(1)).unwrap().id;
    region.attach_volume(volume, guest.instance.id(), "/dev/sdf").unwrap();
    guest.until_it_has(2);
    assert!(guest.answers("write 1 3 word", "wrote"));
    region.detach_volume(volume).unwrap();
    guest.until_it_has(1);
    let mut sector = [0; SECTOR];
    region.volume_disk(volume).unwrap().read_at(&mut sector, 3 * SECTOR as u64).unwrap();
    assert_eq!(&sector[..5], b"word\0");
    // It comes to a second one as it was left.
    region.attach_volume(volume, guest.instance.id(), "/dev/sdg").unwrap();
    guest.until_it_has(2);
    assert!(guest.answers("read 1 3", "data word"));
    guest.instance.terminate().unwrap();
    assert_eq!(state(&region, volume), VolumeState::Available);
}
