//! What a region asks of a network: a place for each instance, and a port for each of its machines.
//!
//! The crate `network-vpc` has one. A region without a network has instances without ports.

use std::collections::HashSet;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};

use ami_core::{BlockDeviceMapping, InstanceId, NetworkInterfaceId, SecurityGroupId, SubnetId, VpcId};
use serde::{Deserialize, Serialize};

use crate::machine::NetSpec;
use crate::net::MacAddress;
use crate::{Error, ErrorKind, InstanceDescription, Result};

/// Where an instance is to be in a network: what [`LaunchSpec`](crate::LaunchSpec) says of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlacementRequest {
    /// The subnet; the default one, if none is named.
    pub subnet_id: Option<SubnetId>,
    /// The security groups; the default one, if none is named.
    pub security_groups: Vec<SecurityGroupId>,
    /// The address; one that is free, if none is named.
    pub private_ip: Option<Ipv4Addr>,
    /// An interface that is there, in the place of all that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface_id: Option<NetworkInterfaceId>,
    /// More of them, each at the next device index. An instance has one, so that who names any is refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_interfaces: Vec<NetworkInterfaceId>,
    /// Whether it has a public address while it runs; what the subnet says, unless this does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_ip: Option<bool>,
}

impl PlacementRequest {
    /// Whether nothing is asked for.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Where an instance is in a network, for as long as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NetworkPlacement {
    /// The interface that the network has for it.
    pub interface_id: NetworkInterfaceId,
    /// The subnet.
    pub subnet_id: SubnetId,
    /// The VPC of that.
    pub vpc_id: VpcId,
    /// The address in the subnet.
    pub private_ip: Ipv4Addr,
    /// The name in the VPC.
    pub private_dns_name: String,
    /// The Ethernet address.
    pub mac: MacAddress,
    /// The security groups that it is in; of what was [watched](crate::Instance::watch), those that it was launched into.
    pub security_groups: Vec<SecurityGroupId>,
}

impl NetworkPlacement {
    /// An interface's place, with no name and in no group yet.
    pub fn new(
        interface_id: NetworkInterfaceId,
        (vpc_id, subnet_id): (VpcId, SubnetId),
        private_ip: Ipv4Addr,
        mac: MacAddress,
    ) -> Self {
        let (private_dns_name, security_groups) = Default::default();
        Self { interface_id, subnet_id, vpc_id, private_ip, private_dns_name, mac, security_groups }
    }
}

/// An instance whose machine is about to be made, and what its guest may be told of it.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Guest<'a> {
    /// The instance.
    pub instance: &'a InstanceDescription,
    /// Its place.
    pub placement: &'a NetworkPlacement,
    /// What it was given to do.
    pub user_data: Option<&'a [u8]>,
    /// The public key that its user logs in with: that of its key pair when it was launched. None of an instance that
    /// was launched when that was not kept yet.
    pub public_key: Option<&'a str>,
    /// The mappings by which it has instance store. None are of NVMe disks, which it has whatever is mapped.
    pub instance_store: &'a [BlockDeviceMapping],
}

/// A network that instances are plugged into.
///
/// # Contract
///
/// - Any thread may call at any time.
/// - A place is durable when [`place`](Self::place) returns, and is the instance's until it is
///   [released](Self::release). A crash may leave places of instances that never came to be:
///   [`keep_only`](Self::keep_only), which the region calls when it is opened, releases them.
/// - A port ends with its machine: an instance that is started again is plugged in again.
pub trait Network: fmt::Debug + Send + Sync + 'static {
    /// The public key, as OpenSSH writes it, of the key pair of this name: what a new instance keeps, whatever becomes of
    /// the key pair.
    ///
    /// # Errors
    ///
    /// [`KeyPairNotFound`](crate::ErrorKind::KeyPairNotFound).
    fn public_key(&self, name: &str) -> Result<String>;

    /// Reserves a place for an instance. One at an interface that was there is given back by [`release`](Self::release), and
    /// stays.
    ///
    /// # Errors
    ///
    /// [`NetworkInterfaceNotFound`](crate::ErrorKind::NetworkInterfaceNotFound),
    /// [`NetworkInterfaceInUse`](crate::ErrorKind::NetworkInterfaceInUse),
    /// [`SubnetNotFound`](crate::ErrorKind::SubnetNotFound); of a request that names no subnet,
    /// [`VpcNotSpecified`](crate::ErrorKind::VpcNotSpecified) and
    /// [`SubnetNotSpecified`](crate::ErrorKind::SubnetNotSpecified), where there is no default one;
    /// [`SecurityGroupNotFound`](crate::ErrorKind::SecurityGroupNotFound),
    /// [`AddressInUse`](crate::ErrorKind::AddressInUse), [`SubnetFull`](crate::ErrorKind::SubnetFull),
    /// [`InsufficientAddressCapacity`](crate::ErrorKind::InsufficientAddressCapacity), if no public address is left,
    /// [`InvalidParameter`](crate::ErrorKind::InvalidParameter), or what the host refused.
    fn place(&self, instance: InstanceId, request: &PlacementRequest) -> Result<NetworkPlacement>;

    /// Says whether so many places can be had by this request, and leaves all as it is: what a
    /// [dry run](method@crate::LaunchSpec::dry_run) asks.
    ///
    /// Unless the network can tell without that, they are taken and given up again.
    ///
    /// # Errors
    ///
    /// As [`place`](Self::place).
    fn check_places(&self, request: &PlacementRequest, count: u32) -> Result<()> {
        let mut taken = Vec::new();
        let mut take = |_| {
            let nobody = InstanceId::random().map_err(|e| Error::io(e, "cannot make an id"))?;
            taken.push(self.place(nobody, request)?);
            Ok(())
        };
        let outcome = (0..count).try_for_each(&mut take);
        let given_up = taken.iter().map(|placement| self.release(placement)).fold(Ok(()), Result::and);
        outcome.and(given_up)
    }

    /// Plugs a machine in that is about to be made, in the place of its last one. An instance that is `running` has been reset,
    /// and is stopped if this fails: it goes on without what it can do without.
    ///
    /// # Errors
    ///
    /// [`InsufficientAddressCapacity`](crate::ErrorKind::InsufficientAddressCapacity), if no public address is left for one that
    /// is started, or what the host refused.
    fn plug(&self, guest: Guest<'_>) -> Result<NetSpec>;

    /// Has a port of TCP of an instance reached at an address of the host's, if it is not yet, and says at which.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](crate::ErrorKind::Unsupported), of a network without a way in, or what the host refused.
    fn reach(&self, placement: &NetworkPlacement, port: u16) -> Result<SocketAddr> {
        let what = format!("nothing leads to port {port} of {} in this network", placement.private_ip);
        Err(Error::new(ErrorKind::Unsupported, what))
    }

    /// The public address of an instance now, if it has one: by which others reach it.
    fn public_ip(&self, _placement: &NetworkPlacement) -> Option<Ipv4Addr> {
        None
    }

    /// The security groups that an instance is in now, where they may be others than it was launched into.
    fn security_groups(&self, _placement: &NetworkPlacement) -> Option<Vec<SecurityGroupId>> {
        None
    }

    /// What is known of a running instance has changed, which its guest may be told.
    fn update(&self, guest: Guest<'_>);

    /// An instance has stopped, and keeps its place, but for what it has only while it runs.
    fn stopped(&self, _placement: &NetworkPlacement) {}

    /// Gives up a place. Does nothing to one that is given up.
    ///
    /// # Errors
    ///
    /// What the host refused; then the place is released when the region is opened again.
    fn release(&self, placement: &NetworkPlacement) -> Result<()>;

    /// Releases every place that was made for an instance and is not one of these. No instance runs.
    ///
    /// # Errors
    ///
    /// What the host refused.
    fn keep_only(&self, interfaces: &HashSet<NetworkInterfaceId>) -> Result<()>;
}
