//! The places of instances in the network: that a launch takes, and what becomes of them.

use std::sync::PoisonError;

use ami_core::InstanceId;

use super::Parameters;
use crate::description::InstanceDescription;
use crate::error::chain;
use crate::network::{Network, NetworkPlacement};
use crate::record::InstanceRecord;
use crate::region::Inner;
use crate::{Error, ErrorKind, InstanceState, Result};

/// Places that were taken, and are released again unless they are [kept](Self::keep).
pub(super) struct Places<'a> {
    network: Option<&'a dyn Network>,
    spec: &'a Parameters,
    taken: Vec<NetworkPlacement>,
}

impl Inner {
    /// Checks what a launch asks of the network. Gives the public key of its key pair, if the network has one.
    pub(super) fn check_network(&self, spec: &Parameters) -> Result<Option<String>> {
        match (&self.network, &spec.key_name) {
            (None, _) if !spec.placement.is_default() => {
                let what = "the region has no network, and so no subnets, groups and addresses";
                Err(Error::new(ErrorKind::Unsupported, what))
            }
            (Some(network), Some(key)) => network.public_key(key).map(Some),
            _ => Ok(None),
        }
    }

    /// Tells the network what is now known of an instance that runs, or that it does no longer.
    pub(crate) fn tell_network(&self, record: &InstanceRecord) {
        let Some(network) = self.network.as_deref() else { return };
        let told = match record.description.state {
            InstanceState::Running => record.with_guest(|guest| {
                network.update(guest);
                Ok(())
            }),
            InstanceState::Stopped => {
                record.description.network.iter().for_each(|placement| network.stopped(placement));
                Ok(None)
            }
            _ => return,
        };
        if let Err(e) = told {
            tracing::warn!(instance = %record.description.id, error = chain(&e), "the network is not told of a change");
        }
    }

    /// That the network has places for so many instances.
    pub(super) fn check_places(&self, spec: &Parameters, count: u32) -> Result<()> {
        let Some(network) = &self.network else { return Ok(()) };
        // Not while a launch takes its places: they may be taken for that.
        let _placing = self.placing.lock().unwrap_or_else(PoisonError::into_inner);
        network.check_places(&spec.placement, count)
    }

    pub(super) fn places<'a>(&'a self, spec: &'a Parameters) -> Places<'a> {
        Places { network: self.network.as_deref(), spec, taken: Vec::new() }
    }

    /// Gives up the place of an instance that is gone, if it has one.
    pub(crate) fn release_place(&self, instance: &InstanceDescription) {
        if let (Some(network), Some(placement)) = (&self.network, &instance.network) {
            if let Err(e) = network.release(placement) {
                tracing::warn!(instance = %instance.id, error = chain(&e), "cannot give up an instance's place");
            }
        }
    }
}

impl Places<'_> {
    /// A place for one more instance, if there is a network.
    pub(super) fn next(&mut self, instance: InstanceId) -> Result<Option<NetworkPlacement>> {
        let Some(network) = self.network else { return Ok(None) };
        let placement = network.place(instance, &self.spec.placement)?;
        self.taken.push(placement.clone());
        Ok(Some(placement))
    }

    /// Leaves them to the instances.
    pub(super) fn keep(mut self) {
        self.taken.clear();
    }
}

impl Drop for Places<'_> {
    fn drop(&mut self) {
        for placement in &self.taken {
            // What stays is released when the region is opened again.
            if let Some(Err(e)) = self.network.map(|network| network.release(placement)) {
                tracing::warn!(error = chain(&e), "cannot give up a place");
            }
        }
    }
}
