//! A virtual private cloud in the process: a switch that knows where each address is, a stateful firewall, ways in
//! and out over the host's sockets, DHCP, DNS and the instance metadata service.
//!
//! Nothing of it needs a privilege. A [`Network`] has VPCs, subnets, security groups, interfaces and key pairs, by
//! EC2's names; an interface is [plugged in](Network::plug) and gives the port that a machine is made with.
//!
//! ```
//! use network_vpc::{Direction, Metadata, Network, Rule};
//!
//! # let dir = tempfile::tempdir()?;
//! # let dir = dir.path();
//! let network = Network::open(dir, &"us-east-1".parse()?)?;
//! let group = network.create_security_group(network.default_vpc()?, "web", "what a web server needs")?;
//! network.authorize(group.id, Direction::Ingress, Rule::tcp(80, "0.0.0.0/0".parse()?))?;
//!
//! let interface = network.create_interface(network.interface_spec()?.groups([group.id]))?;
//! let web = network.forward(interface.id, 80, "127.0.0.1:0".parse()?)?;
//! let port = network.plug(interface.id)?; // for `MachineSpec::nets`
//! network.set_metadata(interface.id, Some(Metadata::new("i-0123456789abcdef0".parse()?)))?;
//! println!("http://{web}/ reaches port 80 of {}", interface.private_ip);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How it works
//!
//! - **The switch** decides in the thread that sends, the interface's own where its machine is behind a
//!   [stream](instance_core::net::FrameStream): a function of the frame, of what is known of the interface
//!   and of the time. It answers ARP, DHCP and pings of the router by itself, lets no frame out with another's
//!   address, and learns nothing from what guests claim.
//! - **Security groups** decide about the first packet of a conversation, at the sender's interface and at the
//!   receiver's. What was allowed is remembered in a bounded table and outlives its rule; beginnings, and what comes
//!   from made-up addresses, never take the place of conversations that go on. As in EC2, what is open to everybody
//!   in both directions is not tracked, and ends with its rule. Fragments are put together first, as only one of them
//!   has ports to decide by, and cut again for their receiver.
//! - **The world outside** is reached over sockets of the host, one a conversation: a stack in user space speaks TCP
//!   with the guest. Clients come in at forwarded ports, of [TCP](Network::forward) and of
//!   [UDP](Network::forward_udp). The host's own addresses
//!   are out of reach unless [allowed](NetworkOptions::reach_host), and loopback and link-local ones always. What of
//!   it a subnet reaches its [route table](Network::create_route) says; the VPC that is there from the beginning has a
//!   gateway and a route to it. [Elastic IP addresses](Network::allocate_address) are addresses of the host's, at which
//!   the ports of TCP and UDP are reached that rules name; others an instance has
//!   [while it runs](Network::set_map_public_ip_on_launch). How many sockets all guests have open together is
//!   [bounded](NetworkOptions::sockets). Pings go out where the host lets its users send them, which on Linux is for those
//!   whose group is within `net.ipv4.ping_group_range`; where it does not, no answer comes.
//! - **Services**: DHCP, a resolver at the VPC's second address and at 169.254.169.253, and metadata at
//!   169.254.169.254, each guest's own.
//!
//! # Input, output and errors
//!
//! Calls block for as long as the file `network.json` takes to be written; what a call acknowledged is on disk. An
//! [`Error`] has a [`kind`](Error::kind) to match on and EC2's [`code`](Error::code).
//!
//! # Trust
//!
//! Guests are not trusted, nor who connects from outside. Queues and tables are bounded, and a machine that takes its
//! frames slowly gets those of each sender in turn: a flood delays and loses its own frames. What goes out of the network
//! waits for a thread of its sender's own.
//!
//! What goes on outlives its rule, but not its peer: an interface that gets the address of one that was deleted goes
//! on with nothing of what that one had begun.
//!
//! A network in a directory has one owner at a time, by a lock that goes with its last handle or its process.
//!
//! # The privileged alternative
//!
//! Who has the right to make network devices may do without all of this: a [`Tap`](instance_core::net::Tap) gives a port like
//! any other, whose frames go to the host's kernel, on KVM by vhost-net. An implementation of
//! [`instance_core::network::Network`] of one's own then says which instance gets which device. Bridges, routes, firewall and
//! addresses are the host's: security groups would not be kept, so that a [`Network`] gives no such ports.
//!
//! # Left out
//!
//! More than one interface of an instance; IPv6, of which no frame passes; routes to anything but internet gateways and interfaces; public addresses as guests reach them or
//! as the source of what goes out, pings of them, which the host's kernel answers itself, and protocols there but TCP and
//! UDP; what is told of packets that did not arrive (ICMP), which ends at the host: a guest hears that a connection is refused, and of
//! a datagram or a ping nothing; how many hops a packet may go, of which those outside the network count none; and rate limits.

mod answer;
mod backlog;
mod dns;
mod edge;
mod elastic;
mod error;
mod fabric;
mod firewall;
mod fragments;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod key_pair;
mod metadata;
mod model;
mod network;
mod outlet;
mod packet;
mod port;
mod routing;
mod switch;

pub use elastic::{Association, ElasticAddress, PublicPort, PublicPorts};
pub use error::{Error, ErrorKind, Result};
pub use firewall::{Direction, Peer, Ports, Protocol, Rule};
pub use key_pair::{CreatedKeyPair, KeyPair, KeyType};
pub use metadata::Metadata;
pub use model::{NetworkInterface, SecurityGroup, Subnet, Vpc};
pub use network::{DhcpOptions, DhcpSettings, InterfaceSpec, Network, NetworkOptions};
pub use routing::{InternetGateway, Route, RouteState, RouteTable, RouteTarget};
