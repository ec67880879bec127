//! A hypervisor that waits before it makes a machine.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::{Mutex, mpsc};

use ami_core::X86_64;
use instance_core::machine::{
    Capabilities, Execution, Hypervisor, Machine, MachineError, MachineErrorKind, MachineSpec, Runs,
};
use instance_core::testing::FakeHypervisor;

/// Makes no machine before it is told to, or not to.
#[derive(Debug)]
pub(crate) struct Gate {
    asked: mpsc::Sender<()>,
    answers: Mutex<mpsc::Receiver<bool>>,
}

/// Who decides: hears that a machine is asked for, and says whether there is to be one. Once it is gone there is.
pub(crate) type Keeper = (mpsc::Receiver<()>, mpsc::Sender<bool>);

pub(crate) fn gate() -> (Gate, Keeper) {
    let ((asked, hears), (says, answers)) = (mpsc::channel(), mpsc::channel());
    (Gate { asked, answers: Mutex::new(answers) }, (hears, says))
}

impl Hypervisor for Gate {
    fn capabilities(&self) -> Capabilities {
        FakeHypervisor::new().capabilities()
    }

    fn execution(&self) -> Result<Execution, MachineError> {
        FakeHypervisor::new().execution()
    }

    fn create(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, MachineError> {
        let _ = self.asked.send(());
        match self.answers.lock().unwrap().recv() {
            Ok(false) => Err(MachineError::new(MachineErrorKind::Host, "the host has thought better of it")),
            _ => FakeHypervisor::new().create(spec),
        }
    }
}

impl Runs<X86_64> for Gate {}
