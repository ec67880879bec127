//! How a region is opened.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use ami_core::{AccountId, RegionName};
use storage_block::keys::KeyProvider;
use storage_block::{Compression, StoreOptions, Verify};

use crate::machine::Hypervisor;
use crate::network::Network;
use crate::region::{Inner, Region};
use crate::state_store::StateStore;
use crate::{Capacity, Result};

/// How to open a region.
///
/// ```
/// use instance_core::RegionOptions;
/// use instance_core::testing::FakeHypervisor;
///
/// let dir = tempfile::tempdir()?;
/// let options = RegionOptions::new().name("eu-central-1".parse()?).account("123456789012".parse()?);
/// let region = options.open(dir.path(), FakeHypervisor::new())?;
/// assert_eq!(region.name().as_str(), "eu-central-1");
/// assert_eq!(region.account().to_string(), "123456789012");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RegionOptions {
    pub(crate) name: Option<RegionName>,
    pub(crate) account: Option<AccountId>,
    pub(crate) capacity: Capacity,
    pub(crate) state_store: Option<Box<dyn StateStore>>,
    pub(crate) network: Option<Box<dyn Network>>,
    pub(crate) ebs_limits: bool,
    pub(crate) vsock: bool,
    pub(crate) guest_agent: Option<u32>,
    pub(crate) network_limits: bool,
    /// How the content of images, snapshots and volumes is stored and read.
    pub(crate) blocks: StoreOptions,
}

impl fmt::Debug for RegionOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            account,
            capacity,
            state_store,
            network,
            ebs_limits,
            network_limits,
            vsock,
            guest_agent,
            blocks,
        } = self;
        f.debug_struct("RegionOptions")
            .field("name", name)
            .field("account", account)
            .field("capacity", capacity)
            .field("state_store", state_store)
            .field("network", network)
            .field("ebs_limits", ebs_limits)
            .field("vsock", vsock)
            .field("guest_agent", guest_agent)
            .field("network_limits", network_limits)
            .field("blocks", blocks)
            .finish()
    }
}

impl Default for RegionOptions {
    fn default() -> Self {
        Self {
            name: None,
            account: None,
            capacity: Capacity::default(),
            state_store: None,
            network: None,
            ebs_limits: true,
            vsock: false,
            guest_agent: None,
            network_limits: true,
            blocks: StoreOptions::new(),
        }
    }
}

impl RegionOptions {
    /// The defaults: a name that is nobody else's, and account 000000000000.
    pub fn new() -> Self {
        Self::default()
    }

    /// The name of the region. The ids of its images depend on it; it is given once, when the
    /// directory is made.
    #[must_use]
    pub fn name(mut self, name: RegionName) -> Self {
        self.name = Some(name);
        self
    }

    /// The account that owns what is made here, given once, when the directory is made.
    #[must_use]
    pub fn account(mut self, account: AccountId) -> Self {
        self.account = Some(account);
        self
    }

    /// What the region's machines may take together. This host's, each processor given out 16 times and its
    /// memory twice, unless this says otherwise.
    #[must_use]
    pub fn capacity(mut self, capacity: Capacity) -> Self {
        self.capacity = capacity;
        self
    }

    /// Where the region keeps what it knows, if not in its own directory. The files of its volumes and images
    /// stay there, and are removed when this store does not name them: whoever has lost it must not open the
    /// directory with another.
    ///
    /// ```
    /// use instance_core::RegionOptions;
    /// use instance_core::state_store::MemoryStateStore;
    /// use instance_core::testing::FakeHypervisor;
    ///
    /// let dir = tempfile::tempdir()?;
    /// let options = RegionOptions::new().state_store(MemoryStateStore::new());
    /// let region = options.open(dir.path(), FakeHypervisor::new())?;
    /// assert!(!dir.path().join("region.db").exists());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn state_store(mut self, store: impl StateStore) -> Self {
        self.state_store = Some(Box::new(store));
        self
    }

    /// The network that instances are plugged into from now on. Without one they have no ports, and those that were
    /// launched into one do not start.
    #[must_use]
    pub fn network(mut self, network: impl Network) -> Self {
        self.network = Some(Box::new(network));
        self
    }

    /// Whether the disks of an instance are held to what its type's [`EbsBandwidth`](crate::EbsBandwidth) says: they are,
    /// unless this says otherwise.
    #[must_use]
    pub fn ebs_limits(mut self, on: bool) -> Self {
        self.ebs_limits = on;
        self
    }

    /// Whether the machines that are made from now on have a place for streams with this process, for an agent in the
    /// guest: see [`Instance::vsock`](crate::Instance::vsock). They have none unless this says otherwise, as it is one
    /// more device that a guest may attack. On a hypervisor without it no machine is made then.
    #[must_use]
    pub fn vsock(mut self, on: bool) -> Self {
        self.vsock = on;
        self
    }

    /// Has [images of instances that run](crate::Instance::create_image) flush the guest's file systems and take the volumes
    /// while these stand still, in guests where QEMU's guest agent listens on this port of the guest's for streams. The machines
    /// that are made from now on have a place for [streams](Self::vsock) then, too; on a hypervisor without it none is made.
    /// Without an agent, or where the file systems are not flushed and the volumes not taken within ten seconds, an image is
    /// crash-consistent and [says so](crate::CreatedImage::consistency).
    ///
    /// When those have passed at the latest the guest is told to have its file systems go on, and is told again for a minute where
    /// it does not say that they do, such as by an agent that was killed meanwhile; one that hibernates then is told when it is woken.
    /// What the agent has frozen for somebody else it refuses to freeze, and that is left to them; a file system that was frozen
    /// without it, by `fsfreeze`, goes on with the others.
    ///
    /// Distributions have the agent as `qemu-guest-agent`. It waits for a device that is not there, unless it is told to listen
    /// by `/etc/qemu/qemu-ga.conf`:
    ///
    /// ```text
    /// [general]
    /// method = vsock-listen
    /// path = 4294967295:9999
    /// ```
    ///
    /// The first number is any address of the guest's, the second the port. Where the distribution's unit is bound to
    /// that device, as Debian's is, one of the same name takes its place, `/etc/systemd/system/qemu-guest-agent.service`,
    /// to be enabled by `systemctl enable --now qemu-guest-agent`:
    ///
    /// ```text
    /// [Unit]
    /// Description=QEMU Guest Agent
    ///
    /// [Service]
    /// ExecStart=/usr/sbin/qemu-ga
    /// Restart=always
    /// RestartSec=1
    ///
    /// [Install]
    /// WantedBy=multi-user.target
    /// ```
    ///
    /// What else is to be done before and after, such as having a database write what it has in mind, scripts in the guest do,
    /// which `qemu-ga --fsfreeze-hook` runs. The agent can do more than the region asks of it: who does not trust those who have
    /// this process's end of the streams lets it have `guest-sync-delimited`, `guest-fsfreeze-freeze` and `guest-fsfreeze-thaw`
    /// alone (`allow-rpcs`; all others by `block-rpcs` or `blacklist` where it is older).
    ///
    /// ```
    /// use instance_core::RegionOptions;
    /// use instance_core::testing::FakeHypervisor;
    ///
    /// let dir = tempfile::tempdir()?;
    /// let region = RegionOptions::new().guest_agent(9999).open(dir.path(), FakeHypervisor::new())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn guest_agent(mut self, port: u32) -> Self {
        self.guest_agent = Some(port);
        self
    }

    /// Whether the ports of an instance are held to what its type's [`NetworkBandwidth`](crate::NetworkBandwidth) says: they
    /// are, where the hypervisor can, unless this says otherwise.
    #[must_use]
    pub fn network_limits(mut self, on: bool) -> Self {
        self.network_limits = on;
        self
    }

    /// Who has the keys of what is encrypted. Without them nothing is encrypted here, and what was encrypted before cannot
    /// be read; it stays.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use instance_core::testing::FakeHypervisor;
    /// use instance_core::{ErrorKind, Region, RegionOptions, VolumeSpec};
    /// use storage_block::keys::LocalKey;
    ///
    /// let dir = tempfile::tempdir()?;
    /// let keys = Arc::new(LocalKey::create(&dir.path().join("region.key"))?);
    /// let region = RegionOptions::new().keys(keys).open(dir.path().join("region"), FakeHypervisor::new())?;
    /// let volume = region.create_volume(VolumeSpec::new(1).encrypted(true))?;
    /// let backup = region.create_snapshot(volume.id, "as secret as the volume")?;
    /// assert!(volume.kms_key_id.is_some() && backup.kms_key_id == volume.kms_key_id);
    ///
    /// let plain = Region::open(dir.path().join("plain"), FakeHypervisor::new())?;
    /// let refused = plain.create_volume(VolumeSpec::new(1).encrypted(true)).unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::KeyUnavailable);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn keys(mut self, provider: Arc<dyn KeyProvider>) -> Self {
        self.blocks = self.blocks.keys(provider);
        self
    }

    /// How what is stored from now on is compressed: not at all, unless this says otherwise. It may be another each time
    /// the region is opened.
    ///
    /// ```
    /// use instance_core::RegionOptions;
    /// use instance_core::testing::FakeHypervisor;
    /// use storage_block::{Compression, Verify};
    ///
    /// let dir = tempfile::tempdir()?;
    /// let options = RegionOptions::new()
    ///     .compression(Compression::WherePays { percent: 20 })
    ///     .cache_bytes(64 << 20) // of what is unpacked
    ///     .verify(Verify::Digest);
    /// let region = options.open(dir.path(), FakeHypervisor::new())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn compression(mut self, compression: Compression) -> Self {
        self.blocks = self.blocks.compression(compression);
        self
    }

    /// What content is compared with when it is first read after the region was opened: its checksum, unless this says
    /// otherwise.
    #[must_use]
    pub fn verify(mut self, verify: Verify) -> Self {
        self.blocks = self.blocks.verify(verify);
        self
    }

    /// How many bytes of what was compressed are kept in memory as they are read: 16 MiB unless this says otherwise.
    #[must_use]
    pub fn cache_bytes(mut self, bytes: usize) -> Self {
        self.blocks = self.blocks.cache_bytes(bytes);
        self
    }

    /// Opens the region in `dir`, made when it is not there.
    ///
    /// What an earlier process left half done is finished or undone first: see
    /// [`Region::open`].
    ///
    /// # Errors
    ///
    /// [`RegionInUse`](crate::ErrorKind::RegionInUse) if it has an owner,
    /// [`InvalidParameter`](crate::ErrorKind::InvalidParameter) if it has another name or account,
    /// [`Corrupt`](crate::ErrorKind::Corrupt) if its files are not what they should be or of a format that
    /// this version does not know, or what the host met.
    pub fn open<H: Hypervisor>(self, dir: impl AsRef<Path>, hypervisor: H) -> Result<Region<H>> {
        Ok(Region::of(Inner::open(self, dir.as_ref(), Box::new(hypervisor))?))
    }
}
