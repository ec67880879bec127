//! Resource ids: a prefix that says what it is, a dash, and hexadecimal digits.
//!
//! EC2 writes 17 digits today and wrote 8 before 2016; both are read, 17 are written (EC2 User
//! Guide, "Resource IDs").

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::quote;

/// A text that is no id of the kind asked for.
///
/// ```
/// use ami_core::{AmiId, InstanceId};
///
/// let err = "i-0123456789abcdef0".parse::<AmiId>().unwrap_err();
/// assert_eq!(err.to_string(), r#""i-0123456789abcdef0" is not an id of the form ami-0123456789abcdef0"#);
/// assert_eq!((err.prefix(), err.code()), (AmiId::PREFIX, "InvalidAMIID.Malformed"));
/// assert!("i-0123456789abcdef0".parse::<InstanceId>().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is not an id of the form {prefix}-0123456789abcdef0", quote(.text))]
pub struct MalformedId {
    text: String,
    prefix: &'static str,
}

impl MalformedId {
    /// The prefix of the kind of id that was expected, such as `ami`.
    pub fn prefix(&self) -> &'static str {
        self.prefix
    }

    /// The code of EC2's error, such as `InvalidAMIID.Malformed`.
    pub fn code(&self) -> &'static str {
        match self.prefix {
            AmiId::PREFIX => "InvalidAMIID.Malformed",
            InstanceId::PREFIX => "InvalidInstanceID.Malformed",
            ReservationId::PREFIX => "InvalidReservationID.Malformed",
            VolumeId::PREFIX => "InvalidVolumeID.Malformed",
            SnapshotId::PREFIX => "InvalidSnapshotID.Malformed",
            SubnetId::PREFIX => "InvalidSubnetID.Malformed",
            NetworkInterfaceId::PREFIX => "InvalidNetworkInterfaceId.Malformed",
            SecurityGroupId::PREFIX => "InvalidGroupId.Malformed",
            SecurityGroupRuleId::PREFIX => "InvalidSecurityGroupRuleId.Malformed",
            RouteTableId::PREFIX => "InvalidRouteTableId.Malformed",
            AllocationId::PREFIX => "InvalidAllocationID.Malformed",
            AssociationId::PREFIX => "InvalidAssociationID.Malformed",
            DhcpOptionsId::PREFIX => "InvalidDhcpOptionsId.Malformed",
            LaunchTemplateId::PREFIX => "InvalidLaunchTemplateId.Malformed",
            ImportImageTaskId::PREFIX | CopyImageTaskId::PREFIX | CreateImageTaskId::PREFIX => {
                "InvalidConversionTaskId.Malformed"
            }
            ExportImageTaskId::PREFIX => "InvalidExportTaskID.Malformed",
            _ => "InvalidParameterValue",
        }
    }
}

/// The digits after the dash. Kept as a number with a length, so that ids are `Copy` and compare
/// without touching the heap.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Digits {
    long: bool,
    value: u128,
}

impl Digits {
    const LONG: usize = 17;
    const SHORT: usize = 8;
    const MASK: u128 = (1 << (4 * Self::LONG)) - 1;

    fn parse(text: &str) -> Option<Self> {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if !text.bytes().all(hex) || ![Self::LONG, Self::SHORT].contains(&text.len()) {
            return None;
        }
        let value = u128::from_str_radix(text, 16).ok()?;
        Some(Self { long: text.len() == Self::LONG, value })
    }

    fn from_bytes(bytes: [u8; 16]) -> Self {
        Self { long: true, value: (u128::from_be_bytes(bytes) >> (128 - 4 * Self::LONG)) & Self::MASK }
    }
}

impl fmt::Display for Digits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = if self.long { Self::LONG } else { Self::SHORT };
        write!(f, "{:0width$x}", self.value)
    }
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// Parses from and displays as EC2 writes it; serialises as that text.
        ///
        /// ```
        #[doc = concat!("use ami_core::", stringify!($name), ";")]
        ///
        #[doc = concat!("let id: ", stringify!($name), " = \"", $prefix, "-0123456789abcdef0\".parse()?;")]
        #[doc = concat!("assert_eq!(id.to_string(), \"", $prefix, "-0123456789abcdef0\");")]
        #[doc = concat!("assert_ne!(", stringify!($name), "::random()?, id);")]
        #[doc = concat!("let zero = ", stringify!($name), "::from_bytes([0; 16]).to_string();")]
        #[doc = concat!("assert_eq!(zero, format!(\"{}-00000000000000000\", ", stringify!($name), "::PREFIX));")]
        /// # Ok::<(), Box<dyn std::error::Error>>(())
        /// ```
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $name(Digits);

        impl $name {
            /// What the text of such an id begins with, before the dash.
            pub const PREFIX: &'static str = $prefix;

            /// A new id, from the operating system's random numbers.
            ///
            /// # Errors
            ///
            /// Only where the operating system has no random numbers to give.
            pub fn random() -> std::io::Result<Self> {
                let mut bytes = [0; 16];
                getrandom::fill(&mut bytes).map_err(std::io::Error::from)?;
                Ok(Self::from_bytes(bytes))
            }

            /// The id made of the first 68 bits of `bytes`.
            pub fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Digits::from_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&format!("{}-{}", $prefix, self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = MalformedId;

            fn from_str(text: &str) -> Result<Self, MalformedId> {
                text.strip_prefix(concat!($prefix, "-"))
                    .and_then(Digits::parse)
                    .map(Self)
                    .ok_or_else(|| MalformedId { text: text.to_owned(), prefix: $prefix })
            }
        }

        impl TryFrom<String> for $name {
            type Error = MalformedId;

            fn try_from(text: String) -> Result<Self, MalformedId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    )*};
}

ids! {
    /// The id of an Amazon Machine Image.
    AmiId = "ami";
    /// The id of an instance.
    InstanceId = "i";
    /// The id of the reservation that a launch makes.
    ReservationId = "r";
    /// The id of a volume.
    VolumeId = "vol";
    /// The id of a snapshot.
    SnapshotId = "snap";
    /// The id of a network interface.
    NetworkInterfaceId = "eni";
    /// The id of a virtual private cloud.
    VpcId = "vpc";
    /// The id of a subnet.
    SubnetId = "subnet";
    /// The id of a security group.
    SecurityGroupId = "sg";
    /// The id of a security group's rule.
    SecurityGroupRuleId = "sgr";
    /// The id of a route table.
    RouteTableId = "rtb";
    /// The id of an internet gateway.
    InternetGatewayId = "igw";
    /// The id of an Elastic IP address's allocation.
    AllocationId = "eipalloc";
    /// The id of an Elastic IP address's association with a network interface.
    AssociationId = "eipassoc";
    /// The id of a set of DHCP options.
    DhcpOptionsId = "dopt";
    /// The id of a key pair.
    KeyPairId = "key";
    /// The id of a launch template.
    LaunchTemplateId = "lt";
    /// The id of a task that imports an image.
    ImportImageTaskId = "import-ami";
    /// The id of a task that exports an image.
    ExportImageTaskId = "export-ami";
    /// The id of a task that copies an image; EC2 has none.
    CopyImageTaskId = "copy-ami";
    /// The id of a task that makes an image of an instance; EC2 has none.
    CreateImageTaskId = "create-ami";
}
