//! For tests: the conformance suites of the crate's traits, and a hypervisor that runs nothing.

mod agent;
pub mod conformance;
mod fake;
mod ping;
mod state_store;
pub mod taps;

pub use agent::{AgentSays, FakeAgent};
pub use fake::{FakeHypervisor, fake_kernel, tiny_elf};
pub use state_store::{durable_state_store_conformance, state_store_conformance};
