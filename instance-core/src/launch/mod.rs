//! Launching: from an image and hardware to instances that run (`RunInstances`).

mod bootable;
mod in_flight;
mod make;
mod parameters;
mod places;
pub(crate) mod plan;
mod prepare;
mod spec;
mod tokens;

use std::sync::Arc;
use std::time::Instant;

use ami_core::{AccountId, Ami, Arch, Digest, ReservationId};

pub(crate) use self::in_flight::{InFlight, Needs};
pub(crate) use self::make::When;
use self::parameters::Parameters;
pub(crate) use self::parameters::{Launch, digest_of};
use self::plan::Planned;
use self::prepare::Prepared;
pub use self::spec::LaunchSpec;
pub(crate) use self::tokens::Tokens;
use self::tokens::Turn;
use crate::instance::{Cell, Hold, Instance};
use crate::machine::Runs;
use crate::record::LaunchedFrom;
use crate::region::{Inner, Region};
use crate::state_changes::StateChange;
use crate::{Error, ErrorKind, InstanceState, Result};

/// What a launch gave.
///
/// ```
/// # use ami_core::{Ami, X86_64};
/// # use instance_core::testing::{FakeHypervisor, tiny_elf};
/// # use instance_core::{DirectBoot, ImageSource, LaunchSpec, Region};
/// # let dir = tempfile::tempdir()?;
/// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
/// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
/// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
/// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
/// let spec = LaunchSpec::new("t2.nano".parse()?).count(2, 2).client_token("once");
/// let reservation = region.run_instances(&ami, spec.clone())?;
/// assert_eq!(reservation.instances.len(), 2);
/// let again = region.run_instances(&ami, spec)?;
/// assert_eq!(again.id, reservation.id);
/// assert_eq!(region.instances().len(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Reservation {
    /// Its id.
    pub id: ReservationId,
    /// The account that launched.
    pub owner: AccountId,
    /// The instances.
    pub instances: Vec<Instance>,
}

impl<H> Region<H> {
    /// Launches an instance of `ami` and returns it when its machine runs.
    ///
    /// Its volumes are made copy-on-write from the image's snapshots, in constant time.
    ///
    /// ```no_run
    /// # fn demo(region: &instance_core::Region) -> Result<(), Box<dyn std::error::Error>> {
    /// use instance_core::LaunchSpec;
    ///
    /// let image = region.image("ami-0123456789abcdef0".parse()?)?;
    /// let server = region.launch(image.ami(), LaunchSpec::new("t3.micro".parse()?).tag("Name", "web"))?;
    /// println!("{} is {}", server.id(), server.state());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`run_instances`](Self::run_instances), and
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination) for more than one instance.
    pub fn launch<A: Arch>(&self, ami: &Ami<A>, spec: LaunchSpec) -> Result<Instance>
    where
        H: Runs<A>,
    {
        if spec.count.is_some_and(|(_, max)| max > 1) {
            let what = "launch makes one instance; run_instances makes several";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
        }
        let mut instances = self.run_instances(ami, spec)?.instances;
        instances.pop().ok_or_else(|| Error::new(ErrorKind::Internal, "a launch gave no instance"))
    }

    /// Launches instances of `ami` and returns them when their machines run, as many as can be up to the
    /// [`count`](method@LaunchSpec::count) and all of them or none up to its minimum (`RunInstances`).
    ///
    /// # Errors
    ///
    /// Before anything is made: [`ImageNotFound`](ErrorKind::ImageNotFound),
    /// [`AuthFailure`](ErrorKind::AuthFailure), [`ImageUnavailable`](ErrorKind::ImageUnavailable),
    /// [`OptInRequired`](ErrorKind::OptInRequired) for another's image with a product code whose terms the account has not
    /// [accepted](Self::accept_terms), [`ArchitectureMismatch`](ErrorKind::ArchitectureMismatch),
    /// [`Unsupported`](ErrorKind::Unsupported) for an image that is made for a [TPM](ami_core::TpmSupport), and for
    /// hardware or more disks than the hypervisor gives,
    /// [`InvalidParameter`](ErrorKind::InvalidParameter), [`InvalidBlockDeviceMapping`](ErrorKind::InvalidBlockDeviceMapping),
    /// [`InvalidParameterCombination`](ErrorKind::InvalidParameterCombination) for a type without the instance store that
    /// the image's root device is to be,
    /// [`SnapshotNotFound`](ErrorKind::SnapshotNotFound), [`MalformedTagKey`](ErrorKind::MalformedTagKey),
    /// [`TagLimitExceeded`](ErrorKind::TagLimitExceeded), [`KeyPairNotFound`](ErrorKind::KeyPairNotFound),
    /// [`SubnetNotFound`](ErrorKind::SubnetNotFound), or with no subnet named and no default one
    /// [`VpcNotSpecified`](ErrorKind::VpcNotSpecified) and [`SubnetNotSpecified`](ErrorKind::SubnetNotSpecified),
    /// [`SecurityGroupNotFound`](ErrorKind::SecurityGroupNotFound), [`AddressInUse`](ErrorKind::AddressInUse),
    /// [`SubnetFull`](ErrorKind::SubnetFull),
    /// [`InsufficientAddressCapacity`](ErrorKind::InsufficientAddressCapacity),
    /// [`UnsupportedHibernation`](ErrorKind::UnsupportedHibernation),
    /// [`IdempotentParameterMismatch`](ErrorKind::IdempotentParameterMismatch),
    /// [`IdempotentInstanceTerminated`](ErrorKind::IdempotentInstanceTerminated),
    /// [`ResourceCountExceeded`](ErrorKind::ResourceCountExceeded) for more than
    /// [so many](LaunchSpec::MAX_COUNT), whether or not fewer would do,
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable) for encrypted volumes without keys,
    /// [`InsufficientCapacity`](ErrorKind::InsufficientCapacity), and, for a
    /// [dry run](method@LaunchSpec::dry_run), [`DryRunOperation`](ErrorKind::DryRunOperation) or
    /// [`UnauthorizedOperation`](ErrorKind::UnauthorizedOperation). Later:
    /// [`Unsupported`](ErrorKind::Unsupported) for what else the hypervisor cannot give,
    /// [`InsufficientCapacity`](ErrorKind::InsufficientCapacity),
    /// [`Hypervisor`](ErrorKind::Hypervisor) and others when the host fails, after which nothing is left of
    /// the launch.
    pub fn run_instances<A: Arch>(&self, ami: &Ami<A>, spec: LaunchSpec) -> Result<Reservation>
    where
        H: Runs<A>,
    {
        let (owner, launch) = (*self.account(), Launch::of(ami.id(), spec)?);
        let run = || self.inner.run(owner, &launch);
        let cells = match launch.client_token.as_deref().filter(|_| !launch.dry_run) {
            Some(token) => {
                launch.check()?;
                self.inner.run_once(owner, token, launch.digest()?, None, run)
            }
            None => run(),
        };
        self.reservation(cells?)
    }

    pub(crate) fn reservation(&self, cells: Vec<Arc<Cell>>) -> Result<Reservation> {
        let first = cells.first().map(|cell| cell.description.get().reservation_id);
        let id = first.ok_or_else(|| Error::new(ErrorKind::Internal, "a launch gave no instance"))?;
        let instance = |cell| Instance::new(self.inner.clone(), cell);
        Ok(Reservation { id, owner: *self.account(), instances: cells.into_iter().map(instance).collect() })
    }
}

/// An instance that is being launched.
struct Launching<'a> {
    cell: &'a Arc<Cell>,
    hold: Hold<'a>,
    planned: &'a [Planned],
    done: Result<()>,
}

impl Inner {
    /// Launches, unless a launch with the same client token has happened.
    pub(crate) fn run_once(
        &self,
        owner: AccountId,
        token: &str,
        asked: Digest,
        from: Option<LaunchedFrom>,
        run: impl FnOnce() -> Result<Vec<Arc<Cell>>>,
    ) -> Result<Vec<Arc<Cell>>> {
        // With the last instance of a launch its token is free.
        self.forget_terminated(Instant::now());
        match self.tokens.begin(owner, token, asked)? {
            Turn::First(under_way) => {
                let cells = run()?;
                under_way.done(cells.iter().map(|cell| cell.id).collect(), from);
                Ok(cells)
            }
            Turn::Again(ids) => {
                let known = self.cells();
                let cells: Vec<_> = ids.iter().filter_map(|id| known.get(id).cloned()).collect();
                drop(known);
                let ended = |cell: &Arc<Cell>| cell.description.get().state == InstanceState::Terminated;
                if cells.iter().all(ended) {
                    let what = format!(
                        "the instances that were launched with the client token {token:?} are terminated"
                    );
                    return Err(Error::new(ErrorKind::IdempotentInstanceTerminated, what));
                }
                Ok(cells)
            }
        }
    }

    pub(crate) fn run(&self, owner: AccountId, launch: &Launch) -> Result<Vec<Arc<Cell>>> {
        self.run_launch(owner, launch).map_err(Error::of_instance)
    }

    fn run_launch(&self, owner: AccountId, launch: &Launch) -> Result<Vec<Arc<Cell>>> {
        self.forget_terminated(Instant::now());
        let damaged = |e: &Error| self.look_for_damage(launch.image, e);
        let Prepared { boot, records, _flight } = self.prepare(owner, launch).inspect_err(damaged)?;
        let (mut cells, mut planned, mut claims) = (Vec::new(), Vec::new(), Vec::new());
        for (record, volumes, claim) in records {
            cells.push(Arc::new(Cell::new(record)));
            planned.push(volumes);
            claims.push(claim);
        }
        let mut launching: Vec<Launching<'_>> = Vec::new();
        for ((cell, planned), claim) in cells.iter().zip(&planned).zip(claims) {
            // Held before anyone can find it.
            let mut hold = cell.hold(self.supervisor.reports());
            hold.claim = Some(claim);
            launching.push(Launching { cell, hold, planned, done: Ok(()) });
            let description = cell.description.get();
            self.directory.set(description.clone());
            self.cells().insert(cell.id, cell.clone());
            self.listeners.tell(&StateChange::of(&description));
        }
        let min = usize::try_from(launch.parameters.min_count).unwrap_or(usize::MAX);
        let outcome = self.make(&mut launching, &boot, min);
        let mut running = Vec::new();
        for one in launching {
            match (&outcome, &one.done) {
                (Ok(()), Ok(())) => running.push(one.cell.clone()),
                (Err(why), _) | (Ok(()), Err(why)) => self.undo_launch(one.cell, one.hold, one.planned, why),
            }
        }
        outcome.map(|()| running).inspect_err(damaged)
    }
}
