//! What the thread of a device does: it serves the queues, and waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;

use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use super::core::Step;
use super::{Port, VirtioDevice};
use crate::gate::Gate;

impl VirtioDevice {
    /// Serves requests until the machine ends. One thread calls this.
    pub(crate) fn serve(&self, vm: &VmFd, gate: &Gate) -> io::Result<()> {
        let Some(notification) = &self.notification else { return Ok(()) };
        // Who closes the gate finds nothing under way.
        while gate.pass_unless(&self.stopped, || self.settle(vm)) {
            if self.stale.swap(false, Ordering::AcqRel) {
                self.refresh(vm);
            }
            if !self.step(vm, gate) {
                self.wait(notification)?;
            }
        }
        Ok(())
    }

    /// Waits for a notification, for the end of something that the device has under way, or until it is due.
    fn wait(&self, notification: &EventFd) -> io::Result<()> {
        let waiting = self.wait_outside();
        let (ended, due_in) = match &self.port {
            Port::Mmio(mmio) => (mmio.ended(), mmio.due_in()),
            Port::Pci(pci) => (pci.ended(), pci.due_in()),
        };
        if ended.is_some() || due_in.is_some() {
            let timeout = due_in.and_then(|due_in| Timespec::try_from(due_in).ok());
            let waited = [Some(descriptor_of(notification)), ended.as_ref().map(|fd| fd.as_fd())];
            let waited = waited.into_iter().flatten();
            let mut waited: Vec<_> = waited.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            match poll(&mut waited, timeout.as_ref()) {
                Ok(_) if waited[0].revents().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(Errno::INTR) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        drop((ended, waiting));
        match notification.read() {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Does a piece of work on each queue, each under a lock of its own, so that the driver gets in between, and whoever
    /// closes the gate. False if there is none.
    pub(crate) fn step(&self, vm: &VmFd, gate: &Gate) -> bool {
        let step = |queue| !gate.is_open() || self.step_queue(vm, queue);
        (0..self.queues()).map(step).fold(false, |any, worked| any | worked)
    }

    fn step_queue(&self, vm: &VmFd, queue: usize) -> bool {
        let step = match &self.port {
            Port::Mmio(mmio) => mmio.step(vm, &self.memory, queue),
            Port::Pci(pci) => pci.step(vm, &self.memory, queue),
        };
        if let Step::Broken(why) = step {
            self.warn(why);
        }
        step != Step::Idle
    }

    /// Has all that was begun end.
    pub(crate) fn settle(&self, vm: &VmFd) {
        for queue in 0..self.queues() {
            let step = match &self.port {
                Port::Mmio(mmio) => mmio.settle(vm, &self.memory, queue),
                Port::Pci(pci) => pci.settle(vm, &self.memory, queue),
            };
            if let Step::Broken(why) = step {
                self.warn(why);
            }
        }
    }
}

/// The descriptor of an eventfd, which vmm-sys-util lends as a number alone.
#[allow(unsafe_code, reason = "a descriptor is borrowed by its number")]
pub(super) fn descriptor_of(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is the eventfd's, which is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
