//! For those who implement or use a hypervisor in tests: a machine without a guest, and the suite
//! that every hypervisor passes.

pub mod conformance;
mod fake;

pub use fake::{FakeHypervisor, fake_kernel, tiny_elf};
