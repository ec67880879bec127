//! How many frames, and how many bytes of them, may pass in a direction.

use std::time::Duration;

use storage_block::Limiter;

/// What holds the frames of one direction of a port to a rate: [`Limiter`]s that all have to let a frame pass. A frame is an
/// operation, and its bytes are those that it has on the cable. Ports may share limiters, with each other and with
/// disks; the limits may be changed at any time, which is noticed when the next frame may pass.
///
/// ```
/// use instance_core::machine::NetSpec;
/// use instance_core::net::{self, FrameLimits};
/// use storage_block::{IoLimits, Limiter, Rate};
///
/// let (machine, _network) = net::link();
/// let mut port = NetSpec::new(machine, "02:00:0a:00:00:0c".parse()?);
/// // A hundred megabits in a second, in each direction.
/// let limits = IoLimits { bytes: Some(Rate::per_second(12_500_000)), ..IoLimits::NONE };
/// port.receive_limits = FrameLimits::new([Limiter::new(limits)]);
/// port.transmit_limits = FrameLimits::new([Limiter::new(limits)]);
/// assert_eq!(port.receive_limits.delay(), None);
/// port.receive_limits.charge(25_000_000);
/// assert!(port.receive_limits.delay().is_some_and(|delay| delay.as_millis() > 900));
/// assert!(!port.transmit_limits.is_none() && FrameLimits::default().is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct FrameLimits(Vec<Limiter>);

impl FrameLimits {
    /// All of these; if there are none, every frame passes.
    pub fn new(limiters: impl IntoIterator<Item = Limiter>) -> Self {
        Self(limiters.into_iter().collect())
    }

    /// Whether every frame passes.
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// How long the next frame has to wait at least; none if it may pass now. A hypervisor asks this before it takes a
    /// frame, and [charges](Self::charge) the frame that it takes.
    pub fn delay(&self) -> Option<Duration> {
        self.0.iter().filter_map(Limiter::delay).max()
    }

    /// Takes what a frame of so many bytes costs that passes.
    pub fn charge(&self, len: usize) {
        self.0.iter().for_each(|limiter| limiter.charge(1, len as u64));
    }
}
