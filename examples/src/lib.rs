//! What the examples have in common. The code in the READMEs is compiled here.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use hypervisor_kvm::Kvm;
use hypervisor_qemu::Qemu;
use instance_core::machine::{Boot, BootFile, Hypervisor};

/// KVM where it is fit for a kernel, else QEMU.
///
/// # Errors
///
/// That there is neither.
pub fn hypervisor() -> Result<Box<dyn Hypervisor>, Box<dyn Error>> {
    match Kvm::open() {
        Ok(kvm) if kvm.execution().is_ok_and(|execution| execution.is_hardware()) => Ok(Box::new(kvm)),
        _ => Ok(Box::new(Qemu::find()?)),
    }
}

/// Debian's kernel, unpacked, with a guest that obeys commands on its console, of those that `cargo xtask guest` makes.
///
/// # Errors
///
/// That they are not in `dir`.
pub fn boot(dir: &Path) -> Result<Boot, Box<dyn Error>> {
    let packed = std::fs::read(dir.join("vmlinuz"))?;
    let mut kernel = tempfile::tempfile()?;
    kernel.write_all(&boot_image::unpack_kernel(&packed)?.image)?;
    let initrd = BootFile::new(File::open(dir.join("conformance.img"))?)?;
    Ok(Boot::new(BootFile::new(kernel)?, Some(initrd), "console=ttyS0 quiet panic=-1"))
}

/// Until when something is waited for.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(120)
}

#[cfg(doctest)]
mod readmes {
    #[doc = include_str!("../../README.md")]
    struct Workspace;
    #[doc = include_str!("../../ami-core/README.md")]
    struct AmiCore;
    #[doc = include_str!("../../storage-block/README.md")]
    struct StorageBlock;
    #[doc = include_str!("../../image-formats/README.md")]
    struct ImageFormats;
    #[doc = include_str!("../../boot-image/README.md")]
    struct BootImage;
    #[doc = include_str!("../../instance-core/README.md")]
    struct InstanceCore;
    #[doc = include_str!("../../hypervisor-kvm/README.md")]
    struct HypervisorKvm;
    #[doc = include_str!("../../network-vpc/README.md")]
    struct NetworkVpc;
    #[doc = include_str!("../../quick-start/README.md")]
    struct QuickStart;
    #[doc = include_str!("../../hypervisor-qemu/README.md")]
    struct HypervisorQemu;
}
