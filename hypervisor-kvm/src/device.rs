//! The host's `/dev/kvm`.

use std::ffi::CString;
use std::io;
use std::path::Path;

use instance_core::machine::{MachineError, MachineErrorKind};
use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};

use crate::error::{HostContext, Result, unsupported};

/// What KVM must be able to do, and what it is for.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "interrupt controllers"),
    (Cap::Ioeventfd, "notifications of devices"),
    (Cap::Irqfd, "the serial port's interrupt"),
    (Cap::Pit2, "a timer"),
    (Cap::SetTssAddr, "tasks of real mode"),
    (Cap::UserMemory, "the guest's memory"),
];

/// Opens it, where it can do what machines need.
pub(crate) fn open(path: &Path) -> Result<Kvm> {
    let device = open_file(path)?;
    let version = device.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(unsupported(format!("KVM has API version {version}, not {KVM_API_VERSION}")));
    }
    if let Some((_, what)) = NEEDED.into_iter().find(|(cap, _)| !device.check_extension(*cap)) {
        return Err(unsupported(format!("this host's KVM has no support for {what}")));
    }
    Ok(device)
}

fn open_file(path: &Path) -> Result<Kvm> {
    let to_c = CString::new(path.as_os_str().as_encoded_bytes()).host("no path")?;
    Kvm::new_with_path(&to_c).map_err(|error| {
        let source = io::Error::from(error);
        let what = match source.kind() {
            io::ErrorKind::NotFound => {
                "there is no /dev/kvm: load the module kvm_intel or kvm_amd, and switch virtualisation on in \
                 the firmware or, in a virtual machine, in its host; without it, use QEMU"
            }
            io::ErrorKind::PermissionDenied => {
                "/dev/kvm may not be opened: add the user to the group that owns it, mostly `kvm`"
            }
            _ => {
                return MachineError::new(MachineErrorKind::Host, "/dev/kvm cannot be opened")
                    .with_source(source);
            }
        };
        MachineError::new(MachineErrorKind::Missing, what).with_source(source)
    })
}
