//! What is put in order when a region is opened.

use std::collections::HashSet;
use std::sync::Arc;

use ami_core::ReservationId;
use storage_block::Volume;

use crate::description::StateReason;
use crate::garbage::remove_others;
use crate::instance::Cell;
use crate::record::{InstanceRecord, VolumeRecord};
use crate::region::Inner;
use crate::{InstanceState, Result, Transition};

impl Inner {
    /// Puts in order what the last owner left.
    pub(crate) fn recover(&self) -> Result<()> {
        let records = self.store.all::<InstanceRecord>()?;
        // What a crash leaves of a launch is all of its instances or none.
        let cut_off: HashSet<ReservationId> = (records.iter())
            .filter(|record| !record.launched && !self.is_whole(record))
            .map(|record| record.description.reservation_id)
            .collect();
        let hibernated: HashSet<String> = (records.iter())
            .filter(|record| record.saved.is_some())
            .map(|record| record.description.id.to_string())
            .collect();
        for record in records {
            let cut_off = !record.launched && cut_off.contains(&record.description.reservation_id);
            self.recover_instance(record, cut_off)?;
        }
        self.recover_tasks()?;
        let volumes: HashSet<String> =
            self.store.all::<VolumeRecord>()?.iter().map(|v| v.id.to_string()).collect();
        remove_others(&self.paths.volumes(), &volumes)?;
        remove_others(&self.paths.instances(), &HashSet::new())?;
        remove_others(&self.paths.hibernated(), &hibernated)?;
        if let Some(network) = &self.network {
            let cells = self.cells();
            let places = cells.values().filter_map(|cell| Some(cell.description.get().network?.interface_id));
            network.keep_only(&places.collect())?;
        }
        self.collect_garbage()
    }

    fn recover_instance(&self, mut record: InstanceRecord, cut_off: bool) -> Result<()> {
        let state = record.description.state;
        let gone = matches!(state, InstanceState::ShuttingDown | InstanceState::Terminated);
        if gone || cut_off {
            return self.forget(&record);
        }
        record.launched = true;
        if let Some(next) = state.after(Transition::Lost) {
            record.description.state = next;
            record.description.state_reason = Some(StateReason::new(
                "Server.InternalError",
                format!("the process that owned the region ended while the instance was {state}"),
            ));
            self.store.commit(|c| c.put(&record))?;
        }
        self.tokens.remember(&record);
        self.directory.set(record.description.clone());
        let cell = Arc::new(Cell::new(record));
        self.cells().insert(cell.id, cell);
        Ok(())
    }

    /// Whether a launch that may have been cut off got as far as it had to: it runs, and has its volumes.
    fn is_whole(&self, record: &InstanceRecord) -> bool {
        let description = &record.description;
        description.state != InstanceState::Pending
            && description.attachments.iter().all(|a| {
                match Volume::open(&self.paths.volume(a.volume_id), &self.blocks) {
                    Ok(_) => true,
                    // It is there: only who has the key is missing.
                    Err(e) => e.kind() == storage_block::ErrorKind::KeyUnavailable,
                }
            })
    }
}
