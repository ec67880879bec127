//! What the tests share: KVM, or a reason to do without, and the bare-metal guest.

#[allow(dead_code, reason = "shared with the benchmarks, which use the rest")]
pub(crate) mod guest;
#[allow(dead_code, reason = "for the tests of balloons")]
pub(crate) mod held;
#[allow(dead_code, reason = "for the tests that run in the lab")]
pub(crate) mod linux;

use std::time::{Duration, Instant};

use hypervisor_kvm::{Kvm, Transport};

/// How long a guest may take for anything: a busy host without nested virtualisation is slow.
#[allow(dead_code, reason = "of those that wait for guests")]
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// When it is over.
#[allow(dead_code, reason = "of those that wait for guests")]
pub(crate) fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// This host's KVM, or `None` with a loud reason. Under CI and in the lab it must be there. Its machines are on virtio-mmio, where
/// a guest finds its devices without looking for them, and figures are of them alone.
#[allow(dead_code, reason = "of those that do not choose the transport")]
pub(crate) fn kvm() -> Option<Kvm> {
    kvm_as_it_comes().map(|kvm| kvm.with_transport(Transport::Mmio))
}

/// The same with what whoever asks for nothing else has.
#[allow(dead_code, reason = "of those that take the transport as it comes")]
pub(crate) fn kvm_as_it_comes() -> Option<Kvm> {
    match Kvm::open() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            let must = ["CI", "AMI_LAB"].into_iter().find(|name| std::env::var_os(name).is_some());
            assert!(
                must.is_none(),
                "nothing may be skipped under {}, but: {error}",
                must.unwrap_or_default()
            );
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}
