//! Sets of DHCP options: what guests are told of whom to ask (VPC User Guide, "DHCP option sets in Amazon VPC").

use std::net::Ipv4Addr;

use ami_core::{DhcpOptionsId, VpcId};
use serde::{Deserialize, Serialize};

use super::{Network, no_random};
use crate::{Error, ErrorKind, Result};

/// The most servers of a kind.
const MOST_SERVERS: usize = 4;

/// What the guests of a VPC are told, of which EC2's own is the default: the VPC's resolver and its domain.
///
/// ```
/// use network_vpc::DhcpSettings;
///
/// let settings = DhcpSettings::default()
///     .domain_name("corp.example.com")
///     .domain_name_servers(["10.0.0.53".parse()?])
///     .ntp_servers(["169.254.169.123".parse()?])
///     .netbios_name_servers(["10.0.0.54".parse()?])
///     .netbios_node_type(2);
/// assert_ne!(settings, DhcpSettings::default());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DhcpSettings {
    domain_name: Option<String>,
    domain_name_servers: Vec<Ipv4Addr>,
    ntp_servers: Vec<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    netbios_name_servers: Vec<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    netbios_node_type: Option<u8>,
}

impl DhcpSettings {
    /// The domain that names without a dot are looked up in; the region's unless this says otherwise.
    pub fn domain_name(mut self, name: impl Into<String>) -> Self {
        self.domain_name = Some(name.into());
        self
    }

    /// Whom guests ask for names, four at most; the VPC's resolver, `AmazonProvidedDNS`, if nobody is named.
    pub fn domain_name_servers(mut self, servers: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        self.domain_name_servers = servers.into_iter().collect();
        self
    }

    /// Whom guests ask for the time, four at most.
    pub fn ntp_servers(mut self, servers: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        self.ntp_servers = servers.into_iter().collect();
        self
    }

    /// Whom guests ask for names of NetBIOS, four at most.
    pub fn netbios_name_servers(mut self, servers: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        self.netbios_name_servers = servers.into_iter().collect();
        self
    }

    /// How guests look for names of NetBIOS (RFC 2132, section 8.7): 1, 2, 4 or 8, of which EC2 recommends 2, to ask the servers
    /// and nobody else.
    pub fn netbios_node_type(mut self, node_type: u8) -> Self {
        self.netbios_node_type = Some(node_type);
        self
    }

    pub(crate) fn domain(&self) -> Option<&str> {
        self.domain_name.as_deref()
    }

    pub(crate) fn name_servers(&self) -> &[Ipv4Addr] {
        &self.domain_name_servers
    }

    pub(crate) fn time_servers(&self) -> &[Ipv4Addr] {
        &self.ntp_servers
    }

    pub(crate) fn netbios_servers(&self) -> &[Ipv4Addr] {
        &self.netbios_name_servers
    }

    pub(crate) fn node_type(&self) -> Option<u8> {
        self.netbios_node_type
    }

    fn check(&self) -> Result<()> {
        let of_domain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        let named = self.domain_name.as_deref().unwrap_or("x");
        let sound = !named.is_empty()
            && named.len() <= 253
            && named.chars().all(of_domain)
            && self.domain_name_servers.len() <= MOST_SERVERS
            && self.ntp_servers.len() <= MOST_SERVERS
            && self.netbios_name_servers.len() <= MOST_SERVERS
            && self.netbios_node_type.is_none_or(|kind| [1, 2, 4, 8].contains(&kind));
        let what = "a domain is of letters, digits, dashes and dots, there are four servers of a kind at most, and a node type of \
                    NetBIOS is 1, 2, 4 or 8";
        if sound { Ok(()) } else { Err(Error::new(ErrorKind::InvalidParameter, what)) }
    }
}

/// A set of options, which any VPC may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DhcpOptions {
    /// Its id.
    pub id: DhcpOptionsId,
    /// What it says.
    pub settings: DhcpSettings,
}

impl Network {
    /// The sets of DHCP options.
    pub fn dhcp_options(&self) -> Vec<DhcpOptions> {
        self.model().dhcp_options.values().cloned().collect()
    }

    /// Makes a set, which does not change any more.
    ///
    /// # Errors
    ///
    /// [`InvalidParameter`](ErrorKind::InvalidParameter), or what the host refused.
    pub fn create_dhcp_options(&self, settings: DhcpSettings) -> Result<DhcpOptions> {
        settings.check()?;
        let made = DhcpOptions { id: DhcpOptionsId::random().map_err(no_random)?, settings };
        self.change(|model| {
            model.dhcp_options.insert(made.id, made.clone());
            Ok(made)
        })
    }

    /// Gives a VPC a set, or with none the default one. Guests are told when they ask again.
    ///
    /// # Errors
    ///
    /// [`DhcpOptionsNotFound`](ErrorKind::DhcpOptionsNotFound), [`VpcNotFound`](ErrorKind::VpcNotFound), or what the
    /// host refused.
    pub fn associate_dhcp_options(&self, vpc: VpcId, options: Option<DhcpOptionsId>) -> Result<()> {
        self.change(|model| {
            if let Some(id) = options {
                model.dhcp_options.get(&id).ok_or_else(|| no_options(id))?;
            }
            model.vpc_mut(vpc)?.dhcp_options_id = options;
            Ok(())
        })
    }

    /// Deletes a set that no VPC has.
    ///
    /// # Errors
    ///
    /// [`DhcpOptionsNotFound`](ErrorKind::DhcpOptionsNotFound),
    /// [`DependencyViolation`](ErrorKind::DependencyViolation), or what the host refused.
    pub fn delete_dhcp_options(&self, id: DhcpOptionsId) -> Result<()> {
        self.change(|model| {
            if model.vpcs.values().any(|vpc| vpc.dhcp_options_id == Some(id)) {
                return Err(Error::new(ErrorKind::DependencyViolation, format!("a VPC has {id}")));
            }
            model.dhcp_options.remove(&id).map(drop).ok_or_else(|| no_options(id))
        })
    }
}

fn no_options(id: DhcpOptionsId) -> Error {
    Error::new(ErrorKind::DhcpOptionsNotFound, format!("there is no {id}"))
}
