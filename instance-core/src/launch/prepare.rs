//! What a launch finds out before it makes anything: whether it can be, and what its instances are to be.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use ami_core::{
    AccountId, Action, BlockDeviceMapping, BootSource, Digest, InstanceId, ReservationId, Timestamp,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::bootable::not_found_to_boot;
use super::in_flight::{Flight, Needs};
use super::parameters::{Launch, Parameters};
use super::plan::{self, Planned};
use crate::capacity::Claim;
use crate::description::InstanceDescription;
use crate::images::gib;
use crate::machine::Boot;
use crate::products::ProductCodes;
use crate::record::{ImageRecord, InstanceRecord};
use crate::region::Inner;
use crate::{Error, ErrorKind, InstanceState, InstanceType, Result};

/// A launch whose parameters have been found good: all that is needed, and nothing made yet.
pub(super) struct Prepared<'a> {
    pub(super) boot: Boot,
    pub(super) records: Vec<(InstanceRecord, Vec<Planned>, Claim)>,
    pub(super) _flight: Flight<'a>,
}

impl Inner {
    /// Checks everything that can be checked beforehand.
    pub(super) fn prepare(&self, owner: AccountId, launch: &Launch) -> Result<Prepared<'_>> {
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
        let plan = record.boot.clone().ok_or_else(|| not_found_to_boot(image))?;
        let boot = self.boot.boot(&plan)?;
        let count = spec.min_count..=spec.max_count;
        let claims = match launch.dry_run {
            true => self.meter.check(&spec.instance_type, count).map(|()| Vec::new())?,
            false => self.meter.claim_several(&spec.instance_type, count)?,
        };
        self.check_size(&disks, spec)?;
        if launch.dry_run {
            self.check_places(spec, spec.min_count)?;
            let what = "the launch would have been made, had it not been asked for as a dry run";
            return Err(Error::new(ErrorKind::DryRunOperation, what));
        }
        let direct = matches!(record.image.ami().manifest().boot().source(), BootSource::Direct { .. });
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
            let id = InstanceId::random().map_err(no_random)?;
            let network = match places.next(id) {
                Ok(network) => network,
                // The rest of the claims is given back.
                Err(e) if is_full(&e) && index >= spec.min_count => break,
                Err(e) => return Err(e),
            };
            let planned = plan::volumes(&disks, owner, now, &checked.volume_tags, codes_of)?;
            let ami = record.image.ami();
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
                network,
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

/// Whether a network has no place left, as a host has no capacity left: what has one by then can be launched.
fn is_full(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::SubnetFull | ErrorKind::InsufficientAddressCapacity)
}
