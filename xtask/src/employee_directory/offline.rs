//! The same Debian without a network, which is told by a disk what it is to do.

use std::path::Path;
use std::time::Instant;

use ami_core::X86_64;
use anyhow::Result;
use instance_core::machine::Hypervisor;
use instance_core::{NoCloudSeed, RegionOptions};
use quick_start::BuiltImage;

use super::{PATIENCE, hardware};
use crate::progress::step;

/// A key, of which nobody has the private part.
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";

/// What its guest says on its console, where there is no other way out: what configured it, and who may log in.
const SCRIPT: &str = "#!/bin/sh
echo \"TOLD BY $(cloud-id) $(hostname) $(cut -d ' ' -f 1,2 /home/debian/.ssh/authorized_keys) END\" > /dev/console
";

/// Launches one in a region without a network, and waits for what it says.
pub(super) fn run(dir: &Path, hypervisor: Box<dyn Hypervisor>, disk: &BuiltImage) -> Result<()> {
    let region = RegionOptions::new().open(dir, hypervisor)?;
    let ami = step("registering the image in a region without a network", || {
        Ok(disk.register(&region)?.ami().typed::<X86_64>()?)
    })?;
    step("having a guest told by a disk what it is to do", || {
        let spec = hardware()?.nocloud_seed(NoCloudSeed::new().public_key(KEY)).user_data(SCRIPT);
        let instance = region.launch(&ami, spec)?;
        let expect = format!("TOLD BY nocloud {} {KEY} END", instance.id());
        instance.console().reader().wait_for(&expect, Instant::now() + PATIENCE)?;
        Ok(instance.terminate()?)
    })
}
