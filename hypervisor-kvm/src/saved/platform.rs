//! What a machine has in KVM beside its processors, as it is saved.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::error::{HostContext, Result, saved};

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The interrupt controllers, the timer, and the clock that guests which know KVM read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Platform {
    chips: Vec<kvm_irqchip>,
    timer: kvm_pit_state2,
    clock: kvm_clock_data,
}

impl Platform {
    /// All of it as it is now.
    pub(crate) fn save(vm: &VmFd) -> Result<Self> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).host("KVM did not tell an interrupt controller's state")?;
            Ok(chip)
        };
        Ok(Self {
            chips: CHIPS.into_iter().map(chip).collect::<Result<_>>()?,
            timer: vm.get_pit2().host("KVM did not tell the timer's state")?,
            clock: vm.get_clock().host("KVM did not tell the clock")?,
        })
    }

    /// Sets all of it, after the processors: interrupts that wait here go to them.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<()> {
        let set = |done: Result<(), kvm_ioctls::Error>| {
            done.map_err(|e| saved("KVM did not take the platform's state of a saved machine").with_source(e))
        };
        // The clock goes on from where it was: the guest does not see how long it was saved. Flags are for
        // what was read.
        set(vm.set_clock(&kvm_clock_data { clock: self.clock.clock, ..Default::default() }))?;
        set(vm.set_pit2(&self.timer))?;
        self.chips.iter().try_for_each(|chip| set(vm.set_irqchip(chip)))
    }
}
