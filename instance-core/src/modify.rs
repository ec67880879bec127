//! What can be changed of an instance (`ModifyInstanceAttribute`).

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::lifecycle::check_ebs_root;
use crate::volumes::check_stopped;
use crate::{
    Error, ErrorKind, Instance, InstanceDescription, InstanceType, LaunchSpec, MetadataOptions, Result,
    ShutdownBehavior,
};

impl Instance {
    /// Gives it other hardware from its next start on. It has to be stopped.
    ///
    /// ```
    /// # use ami_core::{Ami, X86_64};
    /// # use instance_core::testing::{FakeHypervisor, tiny_elf};
    /// # use instance_core::{DirectBoot, ErrorKind, ImageSource, LaunchSpec, Region};
    /// # let dir = tempfile::tempdir()?;
    /// # let region = Region::open(dir.path(), FakeHypervisor::new())?;
    /// # let disk = storage_block::MemoryDisk::new(1 << 20)?.into_disk();
    /// # let source = ImageSource::new(&disk).boot(DirectBoot::new(tiny_elf(), None, ""));
    /// # let ami = region.register_image(Ami::<X86_64>::builder("web"), source)?;
    /// let server = region.launch(&ami, LaunchSpec::new("t2.nano".parse()?).stop_protection(true))?;
    /// let refused = server.stop(std::time::Duration::ZERO).unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::OperationNotPermitted);
    /// server.set_stop_protection(false)?;
    /// server.stop(std::time::Duration::from_secs(60))?;
    /// server.set_instance_type("t2.micro".parse()?)?;
    /// server.set_user_data(Some(b"#!/bin/sh".to_vec()))?;
    /// server.start()?;
    /// assert_eq!(server.describe().instance_type.name(), "t2.micro");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState),
    /// [`ArchitectureMismatch`](ErrorKind::ArchitectureMismatch), [`Unsupported`](ErrorKind::Unsupported) for one that
    /// can [hibernate](Self::hibernate) or whose root device is instance store, or what the host met.
    pub fn set_instance_type(&self, instance_type: InstanceType) -> Result<()> {
        check_ebs_root(&self.describe(), "given another instance type")?;
        let architecture = self.describe().architecture;
        if !instance_type.architectures().contains(&architecture) {
            let what = format!("the instance is for {architecture}, which {instance_type} does not run");
            return Err(Error::new(ErrorKind::ArchitectureMismatch, what));
        }
        if self.describe().hibernation {
            let what = format!("{} can hibernate, and keeps its instance type", self.id());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        self.modify(true, |description| description.instance_type = instance_type)
    }

    /// Sets what its guest is told by its metadata, up to 16 KiB, or nothing. It has to be stopped.
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState),
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for more, or what the host met.
    pub fn set_user_data(&self, bytes: Option<Vec<u8>>) -> Result<()> {
        LaunchSpec::check_user_data(bytes.as_deref())?;
        let (region, cell) = self.parts();
        let mut live = cell.hold(region.supervisor.reports());
        check_stopped(&live)?;
        let mut record = live.record.clone();
        record.user_data = bytes.map(|bytes| BASE64.encode(bytes));
        region.change(cell, &mut live, record)
    }

    /// What its guest is told by its metadata, as it was given.
    pub fn user_data(&self) -> Option<Vec<u8>> {
        let (region, cell) = self.parts();
        let live = cell.hold(region.supervisor.reports());
        // What this version encoded it decodes.
        live.record.user_data().unwrap_or_default()
    }

    /// Protects it against being terminated, or no longer (`DisableApiTermination`).
    ///
    /// # Errors
    ///
    /// [`IncorrectInstanceState`](ErrorKind::IncorrectInstanceState) if it is terminated, or what the host met.
    pub fn set_termination_protection(&self, protect: bool) -> Result<()> {
        self.modify(false, |description| description.termination_protection = protect)
    }

    /// Protects it against being stopped or terminated, or no longer (`DisableApiStop`).
    ///
    /// # Errors
    ///
    /// As [`set_termination_protection`](Self::set_termination_protection).
    pub fn set_stop_protection(&self, protect: bool) -> Result<()> {
        self.modify(false, |description| description.stop_protection = protect)
    }

    /// Sets what happens when the guest powers itself off.
    ///
    /// # Errors
    ///
    /// As [`set_termination_protection`](Self::set_termination_protection), and
    /// [`Unsupported`](ErrorKind::Unsupported) for one whose root device is instance store: that is terminated.
    pub fn set_shutdown_behavior(&self, behavior: ShutdownBehavior) -> Result<()> {
        check_ebs_root(&self.describe(), "stopped by its guest")?;
        self.modify(false, |description| description.shutdown_behavior = behavior)
    }

    /// Sets how its metadata is offered to its guest (`ModifyInstanceMetadataOptions`).
    ///
    /// # Errors
    ///
    /// As [`set_termination_protection`](Self::set_termination_protection), and
    /// [`InvalidParameter`](ErrorKind::InvalidParameter) for a hop limit that is not 1 to 64, or if its tags
    /// are to be offered and one has a key that is no name in a path, and [`Unsupported`](ErrorKind::Unsupported) for metadata
    /// over IPv6.
    pub fn set_metadata_options(&self, options: MetadataOptions) -> Result<()> {
        self.try_modify(false, |description| {
            // Nobody gives it a tag meanwhile that cannot be offered.
            options.check(&description.tags.clone().try_into()?)?;
            description.metadata_options = options;
            Ok(())
        })
    }

    fn modify(&self, stopped: bool, change: impl FnOnce(&mut InstanceDescription)) -> Result<()> {
        self.try_modify(stopped, |description| {
            change(description);
            Ok(())
        })
    }

    fn try_modify(
        &self,
        stopped: bool,
        change: impl FnOnce(&mut InstanceDescription) -> Result<()>,
    ) -> Result<()> {
        let (region, cell) = self.parts();
        let mut live = cell.hold(region.supervisor.reports());
        if stopped {
            check_stopped(&live)?;
        }
        let mut record = live.record.clone();
        check_alive(&record.description)?;
        change(record.description_mut())?;
        region.change(cell, &mut live, record)
    }
}

pub(crate) fn check_alive(description: &InstanceDescription) -> Result<()> {
    if description.state.after(crate::Transition::Terminate).is_none() {
        let what = format!("{} is {}, in which nothing is changed of it", description.id, description.state);
        return Err(Error::new(ErrorKind::IncorrectInstanceState, what));
    }
    Ok(())
}
