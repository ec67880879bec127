//! How the status of instances is described.

use ami_core::{InstanceId, Page};

use super::{InstanceStatus, Status};
use crate::describe::{Describe, DescribeInstances, Filterable};
use crate::directory::not_found;
use crate::region::Region;
use crate::{Instance, InstanceState, Result};

/// A request for what status checks say; [`InstanceStatus`] shows it in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a request does nothing by itself"]
pub struct DescribeInstanceStatus {
    request: DescribeInstances,
    include_all: bool,
}

impl DescribeInstanceStatus {
    /// Of all instances that run.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only of those that this asks for, whose filters are those of
    /// [`describe_instance_status`](Region::describe_instance_status).
    pub fn of(request: Describe<InstanceId>) -> Self {
        Self { request, include_all: false }
    }

    /// Of those in every state, or only of those that run.
    pub fn include_all_instances(mut self, include: bool) -> Self {
        self.include_all = include;
        self
    }
}

impl<H> Region<H> {
    /// What the status checks of the account's instances say (`DescribeInstanceStatus`).
    ///
    /// Filters: `instance-state-code`, `instance-state-name`, `instance-status.reachability` and `.status`,
    /// `system-status.reachability` and `.status`.
    ///
    /// # Errors
    ///
    /// As [`describe_instances`](Self::describe_instances).
    pub fn describe_instance_status(&self, request: &DescribeInstanceStatus) -> Result<Page<InstanceStatus>> {
        let DescribeInstanceStatus { request, include_all } = request;
        request.check::<InstanceStatus>()?;
        let status = |instance: Instance| {
            Some(instance.status()).filter(|status| *include_all || status.state == InstanceState::Running)
        };
        request.answer(self.instances(), Instance::id, status, not_found)
    }
}

impl Filterable for InstanceStatus {
    const WHAT: &'static str = "the status of instances";
    const NAMES: &'static [&'static str] = &[
        "instance-state-code",
        "instance-state-name",
        "instance-status.reachability",
        "instance-status.status",
        "system-status.reachability",
        "system-status.status",
    ];

    fn values(&self, name: &str) -> Vec<String> {
        let reachability = |status: Status| status.reachability().map(str::to_owned).into_iter().collect();
        match name {
            "instance-state-code" => vec![self.state.code().to_string()],
            "instance-state-name" => vec![self.state.to_string()],
            "instance-status.reachability" => reachability(self.instance),
            "instance-status.status" => vec![self.instance.as_str().to_owned()],
            "system-status.reachability" => reachability(self.system),
            "system-status.status" => vec![self.system.as_str().to_owned()],
            _ => Vec::new(),
        }
    }
}
