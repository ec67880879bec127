//! A launch with every parameter decided: what was asked for, what its template says, and EC2's defaults.

use std::collections::BTreeMap;

use ami_core::{AmiId, Digest, Tags};
use serde::Serialize;

use super::LaunchSpec;
use crate::network::PlacementRequest;
use crate::record::LaunchedFrom;
use crate::{
    BlockDeviceMappingRequest, Error, ErrorKind, InstanceType, MetadataOptions, NoCloudSeed, Result,
    ShutdownBehavior,
};

/// What is launched, and with what.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    pub(super) image: AmiId,
    pub(super) parameters: Parameters,
    pub(super) client_token: Option<String>,
    pub(super) dry_run: bool,
    /// What a repeated launch has in common with the first; see [`Launch::digest`].
    asked: Option<Digest>,
    /// The launch template that it is by.
    pub(super) from: Option<LaunchedFrom>,
}

/// What has to be the same for a launch to be a repeated one, beside the image. Its JSON is part of what records
/// keep, as a digest: it stays as it is.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Parameters {
    pub(super) instance_type: InstanceType,
    pub(super) min_count: u32,
    pub(super) max_count: u32,
    pub(super) user_data: Option<Vec<u8>>,
    pub(super) key_name: Option<String>,
    pub(super) tags: BTreeMap<String, String>,
    pub(super) volume_tags: BTreeMap<String, String>,
    pub(super) block_devices: Vec<BlockDeviceMappingRequest>,
    pub(super) shutdown_behavior: ShutdownBehavior,
    pub(super) termination_protection: bool,
    pub(super) stop_protection: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) hibernation: bool,
    pub(super) metadata_options: MetadataOptions,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) nocloud_seed: Option<NoCloudSeed>,
    #[serde(skip_serializing_if = "PlacementRequest::is_default")]
    pub(super) placement: PlacementRequest,
}

impl Launch {
    /// The launch of an image that is named beside what it is launched with.
    pub(super) fn of(image: AmiId, spec: LaunchSpec) -> Result<Self> {
        match spec.image_id {
            Some(other) if other != image => {
                let what = format!("the launch of {image} names another image, {other}");
                Err(Error::new(ErrorKind::InvalidParameterCombination, what))
            }
            _ => Self::decided(spec.image_id(image)),
        }
    }

    /// A launch by a launch template, which was asked for with `asked`.
    pub(crate) fn by_template(spec: LaunchSpec, asked: Digest, from: LaunchedFrom) -> Result<Self> {
        Ok(Self { asked: Some(asked), from: Some(from), ..Self::decided(spec)? })
    }

    /// A launch all of whose parameters are in `spec`.
    fn decided(spec: LaunchSpec) -> Result<Self> {
        let missing = |what| Error::new(ErrorKind::MissingParameter, format!("the launch names no {what}"));
        let (min_count, max_count) = spec.count.unwrap_or((1, 1));
        let parameters = Parameters {
            instance_type: spec.instance_type.ok_or_else(|| missing("instance type"))?,
            min_count,
            max_count,
            user_data: spec.user_data,
            key_name: spec.key_name,
            tags: spec.tags,
            volume_tags: spec.volume_tags,
            block_devices: spec.block_devices,
            shutdown_behavior: spec.shutdown_behavior.unwrap_or_default(),
            termination_protection: spec.termination_protection.unwrap_or_default(),
            stop_protection: spec.stop_protection.unwrap_or_default(),
            hibernation: spec.hibernation.unwrap_or_default(),
            metadata_options: spec.metadata_options.unwrap_or_default(),
            nocloud_seed: spec.nocloud_seed,
            placement: spec.placement,
        };
        let image = spec.image_id.ok_or_else(|| missing("image"))?;
        let (client_token, dry_run) = (spec.client_token, spec.dry_run);
        Ok(Self { image, parameters, client_token, dry_run, asked: None, from: None })
    }

    /// Checks what can be checked without looking at the region.
    pub(super) fn check(&self) -> Result<Checked> {
        LaunchSpec::check_token(self.client_token.as_deref())?;
        self.parameters.check()
    }

    /// The digest of all that has to be the same for a launch to be a repeated one.
    pub(super) fn digest(&self) -> Result<Digest> {
        match self.asked {
            Some(asked) => Ok(asked),
            None => digest_of(&(self.image, &self.parameters)),
        }
    }
}

/// The digest of what a launch was asked for with.
pub(crate) fn digest_of(asked: &impl Serialize) -> Result<Digest> {
    let json = serde_json::to_vec(asked)
        .map_err(|e| Error::new(ErrorKind::Internal, "cannot serialise a launch").with_source(e))?;
    Ok(Digest::of(&json))
}

impl LaunchSpec {
    /// Refuses what no launch could have, whatever else it says.
    pub(crate) fn check_texts(&self) -> Result<()> {
        Self::check_user_data(self.user_data.as_deref())?;
        check_ascii("key name", self.key_name.as_deref(), Self::MAX_KEY_NAME)?;
        let tags = Tags::try_from(self.tags.clone())?;
        Tags::try_from(self.volume_tags.clone())?;
        if let Some(options) = &self.metadata_options {
            options.check(&tags)?;
        }
        self.nocloud_seed.as_ref().map_or(Ok(()), NoCloudSeed::check)?;
        check_devices(&self.block_devices)
    }

    pub(crate) fn check_token(token: Option<&str>) -> Result<()> {
        check_ascii("client token", token, Self::MAX_CLIENT_TOKEN)
    }

    pub(crate) fn check_user_data(bytes: Option<&[u8]>) -> Result<()> {
        match bytes.map(<[u8]>::len) {
            Some(len) if len > Self::MAX_USER_DATA => {
                let what = format!("the user data has {len} bytes; it is limited to {}", Self::MAX_USER_DATA);
                Err(Error::new(ErrorKind::InvalidParameter, what))
            }
            _ => Ok(()),
        }
    }
}

impl Parameters {
    fn check(&self) -> Result<Checked> {
        let (min, max) = (self.min_count, self.max_count);
        if min < 1 || max < min {
            let what =
                format!("{min} to {max} instances cannot be launched; use 1 or more, and no less at most");
            return Err(Error::new(ErrorKind::InvalidParameter, what));
        }
        if max > LaunchSpec::MAX_COUNT {
            let what =
                format!("{max} instances are more than a launch makes, {} at most", LaunchSpec::MAX_COUNT);
            return Err(Error::new(ErrorKind::ResourceCountExceeded, what));
        }
        if max > 1 && self.placement.private_ip.is_some() {
            let what = "several instances cannot have one address";
            return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
        }
        if !self.placement.more_interfaces.is_empty() {
            let what = format!(
                "an instance has one network interface, not {}",
                1 + self.placement.more_interfaces.len()
            );
            return Err(Error::new(ErrorKind::AttachmentLimitExceeded, what));
        }
        if let Some(interface) = self.placement.interface_id {
            let alone = PlacementRequest { interface_id: Some(interface), ..PlacementRequest::default() };
            if max > 1 || self.placement != alone {
                let what =
                    format!("{interface} is for one instance, and has its subnet, groups and addresses");
                return Err(Error::new(ErrorKind::InvalidParameterCombination, what));
            }
        }
        LaunchSpec::check_user_data(self.user_data.as_deref())?;
        check_ascii("key name", self.key_name.as_deref(), LaunchSpec::MAX_KEY_NAME)?;
        let tags = Tags::try_from(self.tags.clone())?;
        self.metadata_options.check(&tags)?;
        self.nocloud_seed.as_ref().map_or(Ok(()), NoCloudSeed::check)?;
        check_devices(&self.block_devices)?;
        Ok(Checked { volume_tags: Tags::try_from(self.volume_tags.clone())? })
    }
}

fn check_devices(mappings: &[BlockDeviceMappingRequest]) -> Result<()> {
    for (place, mapping) in mappings.iter().enumerate() {
        let name = mapping.check()?;
        if mappings[..place].iter().any(|other| other.is_at(name.as_str())) {
            let what = format!("the device {name} is mapped twice");
            return Err(Error::new(ErrorKind::InvalidBlockDeviceMapping, what));
        }
    }
    Ok(())
}

fn check_ascii(what: &str, text: Option<&str>, max: usize) -> Result<()> {
    match text {
        Some(text)
            if !(1..=max).contains(&text.len()) || !text.bytes().all(|b| (b' '..=b'~').contains(&b)) =>
        {
            let what = format!("the {what} must be 1 to {max} ASCII characters");
            Err(Error::new(ErrorKind::InvalidParameter, what))
        }
        _ => Ok(()),
    }
}

/// What a check has made of the texts.
pub(super) struct Checked {
    pub(super) volume_tags: Tags,
}
