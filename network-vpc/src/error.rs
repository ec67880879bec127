//! What can go wrong, under EC2's codes.

use std::error::Error as StdError;
use std::fmt;

/// A result of this crate.
///
/// ```
/// use network_vpc::{Network, NetworkInterface, Result};
///
/// fn first(network: &Network) -> Result<NetworkInterface> {
///     network.create_interface(network.interface_spec()?)
/// }
/// let network = Network::in_memory(&"us-east-1".parse().unwrap())?;
/// assert_eq!(first(&network)?.private_ip.to_string(), "172.31.0.4");
/// # Ok::<(), network_vpc::Error>(())
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is; this is what a program matches on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such VPC.
    VpcNotFound,
    /// A VPC's block is not from /16 to /28.
    InvalidVpcRange,
    /// There is a default VPC.
    DefaultVpcAlreadyExists,
    /// There is no default VPC for what was to be made in it.
    DefaultVpcDoesNotExist,
    /// There is no default VPC, and no other was named.
    VpcNotSpecified,
    /// The default VPC has no default subnet, and no other was named.
    SubnetNotSpecified,
    /// The zone has a default subnet.
    DefaultSubnetAlreadyExists,
    /// There is no such subnet.
    SubnetNotFound,
    /// A subnet's block is not from /16 to /28, or not in its VPC's.
    InvalidSubnetRange,
    /// A subnet's block overlaps another's.
    SubnetConflict,
    /// A subnet has no address left.
    SubnetFull,
    /// There is no such security group.
    GroupNotFound,
    /// The VPC has a group of that name.
    GroupDuplicate,
    /// A security group has as many rules as it may have.
    RulesLimit,
    /// A rule does not make sense.
    InvalidPermission,
    /// The group has that rule already.
    PermissionDuplicate,
    /// There is no such rule.
    PermissionNotFound,
    /// There is no such interface.
    InterfaceNotFound,
    /// An instance has the interface, or it is plugged in.
    InterfaceInUse,
    /// An address is not one of the subnet's that can be given.
    InvalidAddress,
    /// Another interface has the address.
    AddressInUse,
    /// An interface has as many addresses as it may have.
    PrivateAddressLimit,
    /// There is no such internet gateway.
    InternetGatewayNotFound,
    /// The gateway, or the VPC, is not attached.
    GatewayNotAttached,
    /// The gateway is attached already.
    AlreadyAssociated,
    /// There is no such route table.
    RouteTableNotFound,
    /// The table has no such route.
    RouteNotFound,
    /// The table has a route to the destination.
    RouteAlreadyExists,
    /// A table has as many routes as it may have.
    RoutesLimit,
    /// There is no such Elastic IP address.
    AllocationNotFound,
    /// No Elastic IP address leads anywhere by that association.
    AssociationNotFound,
    /// No Elastic IP address is left.
    AddressLimit,
    /// No public address is left for an interface that is to have one while it is plugged in.
    InsufficientAddressCapacity,
    /// There is no such set of DHCP options.
    DhcpOptionsNotFound,
    /// Something else needs what was to be deleted.
    DependencyViolation,
    /// A parameter is out of bounds.
    InvalidParameter,
    /// There is no such key pair.
    KeyPairNotFound,
    /// There is a key pair of that name.
    KeyPairDuplicate,
    /// A text is no public key of a kind that can be used.
    InvalidKeyFormat,
    /// Another process or handle has the network's directory.
    NetworkInUse,
    /// The state on disk cannot be read.
    Corrupt,
    /// The host refused or failed.
    Host,
}

/// A failure: its kind, what it happened to, and what caused it.
///
/// ```
/// use network_vpc::{ErrorKind, Network};
///
/// let network = Network::in_memory(&"us-east-1".parse()?)?;
/// let refused = network.create_subnet(network.default_vpc()?, "10.0.0.0/24".parse()?).unwrap_err();
/// assert_eq!((refused.kind(), refused.code()), (ErrorKind::InvalidSubnetRange, "InvalidSubnet.Range"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    pub(crate) fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    pub(crate) fn host(context: impl Into<String>, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Host, context).with_source(source)
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// EC2's code for it (API reference, "Error codes"); where EC2 has none, `InternalError`.
    pub fn code(&self) -> &'static str {
        match self.kind {
            ErrorKind::VpcNotFound => "InvalidVpcID.NotFound",
            ErrorKind::InvalidVpcRange => "InvalidVpc.Range",
            ErrorKind::DefaultVpcAlreadyExists => "DefaultVpcAlreadyExists",
            ErrorKind::DefaultVpcDoesNotExist => "DefaultVpcDoesNotExist",
            ErrorKind::VpcNotSpecified => "VPCIdNotSpecified",
            ErrorKind::SubnetNotSpecified => "MissingInput",
            ErrorKind::DefaultSubnetAlreadyExists => "DefaultSubnetAlreadyExistsInAvailabilityZone",
            ErrorKind::SubnetNotFound => "InvalidSubnetID.NotFound",
            ErrorKind::InvalidSubnetRange => "InvalidSubnet.Range",
            ErrorKind::SubnetConflict => "InvalidSubnet.Conflict",
            ErrorKind::SubnetFull => "InsufficientFreeAddressesInSubnet",
            ErrorKind::GroupNotFound => "InvalidGroup.NotFound",
            ErrorKind::GroupDuplicate => "InvalidGroup.Duplicate",
            ErrorKind::RulesLimit => "RulesPerSecurityGroupLimitExceeded",
            ErrorKind::PermissionDuplicate => "InvalidPermission.Duplicate",
            ErrorKind::PermissionNotFound => "InvalidSecurityGroupRuleId.NotFound",
            ErrorKind::InterfaceNotFound => "InvalidNetworkInterfaceID.NotFound",
            ErrorKind::InterfaceInUse => "InvalidNetworkInterface.InUse",
            ErrorKind::AddressInUse => "InvalidIPAddress.InUse",
            ErrorKind::PrivateAddressLimit => "PrivateIpAddressLimitExceeded",
            ErrorKind::InternetGatewayNotFound => "InvalidInternetGatewayID.NotFound",
            ErrorKind::GatewayNotAttached => "Gateway.NotAttached",
            ErrorKind::AlreadyAssociated => "Resource.AlreadyAssociated",
            ErrorKind::RouteTableNotFound => "InvalidRouteTableID.NotFound",
            ErrorKind::RouteNotFound => "InvalidRoute.NotFound",
            ErrorKind::RouteAlreadyExists => "RouteAlreadyExists",
            ErrorKind::RoutesLimit => "RouteLimitExceeded",
            ErrorKind::AllocationNotFound => "InvalidAllocationID.NotFound",
            ErrorKind::AssociationNotFound => "InvalidAssociationID.NotFound",
            ErrorKind::AddressLimit => "AddressLimitExceeded",
            ErrorKind::InsufficientAddressCapacity => "InsufficientAddressCapacity",
            ErrorKind::DhcpOptionsNotFound => "InvalidDhcpOptionID.NotFound",
            ErrorKind::DependencyViolation => "DependencyViolation",
            ErrorKind::InvalidAddress | ErrorKind::InvalidPermission | ErrorKind::InvalidParameter => {
                "InvalidParameterValue"
            }
            ErrorKind::KeyPairNotFound => "InvalidKeyPair.NotFound",
            ErrorKind::KeyPairDuplicate => "InvalidKeyPair.Duplicate",
            ErrorKind::InvalidKeyFormat => "InvalidKey.Format",
            ErrorKind::NetworkInUse => "ResourceInUse",
            ErrorKind::Corrupt | ErrorKind::Host => "InternalError",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}
