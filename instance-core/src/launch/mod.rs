//! Launching: from an image and hardware to instances that run (`RunInstances`).

mod bootable;
mod in_flight;
mod make;
mod parameters;
mod places;
pub(crate) mod plan;
mod spec;
mod tokens;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use ami_core::{
    AccountId, Action, Ami, Arch, BlockDeviceMapping, BootSource, Digest, InstanceId, ReservationId,
    Timestamp,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use self::bootable::not_found_to_boot;
use self::in_flight::Flight;
pub(crate) use self::in_flight::{InFlight, Needs};
pub(crate) use self::make::When;
use self::parameters::Parameters;
pub(crate) use self::parameters::{Launch, digest_of};
use self::plan::Planned;
pub use self::spec::LaunchSpec;
pub(crate) use self::tokens::Tokens;
use self::tokens::Turn;
use crate::capacity::Claim;
use crate::description::InstanceDescription;
use crate::images::gib;
use crate::instance::{Cell, Hold, Instance};
use crate::machine::{Boot, Runs};
use crate::products::ProductCodes;
use crate::record::{ImageRecord, InstanceRecord, LaunchedFrom};
use crate::region::{Inner, Region};
use crate::state_changes::StateChange;
use crate::{Error, ErrorKind, InstanceState, InstanceType, Result};

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
    /// [`Unsupported`](ErrorKind::Unsupported) for an image that is made for a [TPM](ami_core::TpmSupport),
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
    /// [`InstanceLimitExceeded`](ErrorKind::InstanceLimitExceeded) for more than
    /// [so many](LaunchSpec::MAX_COUNT), whether or not fewer would do,
    /// [`KeyUnavailable`](ErrorKind::KeyUnavailable) for encrypted volumes without keys,
    /// [`InsufficientCapacity`](ErrorKind::InsufficientCapacity), and, for a
    /// [dry run](method@LaunchSpec::dry_run), [`DryRunOperation`](ErrorKind::DryRunOperation) or
    /// [`UnauthorizedOperation`](ErrorKind::UnauthorizedOperation). Later:
    /// [`Unsupported`](ErrorKind::Unsupported) for hardware that the hypervisor cannot give,
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

/// A launch whose parameters have been found good: all that is needed, and nothing made yet.
struct Prepared<'a> {
    boot: Boot,
    records: Vec<(InstanceRecord, Vec<Planned>, Claim)>,
    _flight: Flight<'a>,
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

    /// Checks everything that can be checked beforehand.
    fn prepare(&self, owner: AccountId, launch: &Launch) -> Result<Prepared<'_>> {
        let checked = launch.check()?;
        let (image, spec) = (launch.image, &launch.parameters);
        let (_naming, record) = self.bootable(image)?;
        record.image.authorize(&owner, Action::Launch).map_err(|e| match e.kind() {
            ami_core::ErrorKind::AuthFailure if launch.dry_run => {
                Error::new(ErrorKind::UnauthorizedOperation, "the account may not launch the image")
                    .with_source(e)
            }
            _ => e.into(),
        })?;
        self.check_architecture(&record, &spec.instance_type)?;
        plan::check_machine(record.image.ami().manifest(), spec)?;
        // Of what is another's not even the size is told.
        let size_of = |named: &Digest| {
            self.codes_of_content(&owner, named)?;
            gib(self.content(named)?.size())
        };
        let disks = plan::disks(record.image.ami().manifest(), &spec.block_devices, size_of)?;
        let named = self.check_contents(owner, &disks, spec)?;
        let codes: ProductCodes = record.image.product_codes().cloned().collect();
        // Those of its own that the launch names, or of the image.
        let codes_of = |digest: &Digest| named.get(digest).unwrap_or(&codes).clone();
        let of_named: ProductCodes = named.values().flatten().cloned().collect();
        if !codes.is_empty() {
            let accepted = self.accepted(&owner, &codes)?;
            record.image.check_terms(&owner, |code| accepted.contains(code))?;
        }
        self.check_accepted(&owner, &of_named)?;
        self.check_keys(&disks)?;
        let public_key = self.check_network(spec)?;
        if spec.hibernation {
            self.can_save().map_err(|what| Error::new(ErrorKind::UnsupportedHibernation, what))?;
        }
        let count = spec.min_count..=spec.max_count;
        if launch.dry_run {
            self.meter.check(&spec.instance_type, count)?;
            let what = "the launch would have been made, had it not been asked for as a dry run";
            return Err(Error::new(ErrorKind::DryRunOperation, what));
        }
        let claims = self.meter.claim_several(&spec.instance_type, count)?;
        let direct = matches!(record.image.ami().manifest().boot().source(), BootSource::Direct { .. });
        let plan = record.boot.clone().ok_or_else(|| not_found_to_boot(image))?;
        let boot = self.boot.boot(&plan)?;
        let direct_boot = direct.then_some(plan);
        let no_random = |e| Error::io(e, "cannot make an id");
        let reservation = ReservationId::random().map_err(no_random)?;
        let now = Timestamp::now();
        let parameters = match launch.client_token {
            Some(_) => Some(launch.digest()?),
            None => None,
        };
        // All of a launch's places, before others take theirs.
        let _placing =
            self.network.as_ref().map(|_| self.placing.lock().unwrap_or_else(PoisonError::into_inner));
        let mut places = self.places(spec);
        let mut records = Vec::new();
        for (index, claim) in (0..).zip(claims) {
            let planned = plan::volumes(&disks, owner, now, &checked.volume_tags, codes_of)?;
            let ami = record.image.ami();
            let id = InstanceId::random().map_err(no_random)?;
            let description = InstanceDescription {
                id,
                owner,
                reservation_id: reservation,
                launch_index: index,
                launch_time: now,
                client_token: launch.client_token.clone(),
                image_id: ami.id(),
                architecture: ami.architecture(),
                instance_type: spec.instance_type.clone(),
                state: InstanceState::Pending,
                state_reason: None,
                state_transition_reason: String::new(),
                shutdown_behavior: plan::shutdown_behavior(ami.manifest(), spec),
                termination_protection: spec.termination_protection,
                stop_protection: spec.stop_protection,
                hibernation: spec.hibernation,
                key_name: spec.key_name.clone(),
                metadata_options: spec.metadata_options.clone(),
                root_device_name: ami.manifest().root_device_name().to_string(),
                root_device_type: ami.manifest().root_device_type(),
                attachments: planned.iter().map(|p| p.attachment.clone()).collect(),
                product_codes: codes.union(&of_named).cloned().collect(),
                network: places.next(id)?,
                tags: spec.tags.clone(),
            };
            let record = InstanceRecord {
                description: Arc::new(description),
                launched: planned.is_empty(),
                direct_boot: direct_boot.clone(),
                user_data: spec.user_data.as_ref().map(|bytes| BASE64.encode(bytes)),
                public_key: public_key.clone(),
                parameters,
                launched_from: launch.from.clone().filter(|_| launch.client_token.is_some()),
                instance_store: plan::instance_store(&disks),
                nocloud_seed: spec.nocloud_seed.clone(),
                host_keys: Vec::new(),
                shut_down: false,
                saved: None,
                ended: None,
            };
            records.push((record, planned, claim));
        }
        let contents = plan::contents(&disks).map(|(_, digest)| digest).collect();
        let flight = self.in_flight.begin(reservation, Needs { image, contents, direct_boot });
        places.keep();
        Ok(Prepared { boot, records, _flight: flight })
    }

    pub(crate) fn check_architecture(&self, image: &ImageRecord, hardware: &InstanceType) -> Result<()> {
        let architecture = image.image.ami().architecture();
        let mismatch = |what: String| Err(Error::new(ErrorKind::ArchitectureMismatch, what));
        if !hardware.architectures().contains(&architecture) {
            return mismatch(format!("the image is for {architecture}, which {hardware} does not run"));
        }
        let can = self.hypervisor.capabilities();
        if !can.architectures.contains(&architecture) {
            return mismatch(format!(
                "the image is for {architecture}, which {} does not run on this host",
                can.name
            ));
        }
        Ok(())
    }

    /// A launch may name content that its account has, beside that of the image. Gives what it names, with its product codes.
    fn check_contents(
        &self,
        owner: AccountId,
        disks: &[BlockDeviceMapping],
        spec: &Parameters,
    ) -> Result<BTreeMap<Digest, ProductCodes>> {
        let mut named = BTreeMap::new();
        if spec.block_devices.is_empty() {
            return Ok(named);
        }
        for digest in spec.block_devices.iter().filter_map(|change| change.content()) {
            named.insert(*digest, self.codes_of_content(&owner, digest)?);
        }
        for (disk, digest) in plan::contents(disks) {
            disk.check_snapshot_size(self.content(&digest)?.size())?;
        }
        Ok(named)
    }
}
