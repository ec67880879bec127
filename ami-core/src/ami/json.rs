//! An image as JSON.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Ami, AnyAmi, Inner};
use crate::error::{Error, ErrorKind};
use crate::{AccountId, AmiId, Arch, Digest, Manifest, RegionName, Timestamp};

#[derive(Serialize)]
struct Written<'a> {
    id: AmiId,
    region: &'a RegionName,
    owner: &'a AccountId,
    name: &'a str,
    created: Timestamp,
    digest: Digest,
    #[serde(skip_serializing_if = "is_first")]
    incarnation: u64,
    manifest: &'a Manifest,
}

fn is_first(incarnation: &u64) -> bool {
    *incarnation == 0
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    id: AmiId,
    region: RegionName,
    owner: AccountId,
    name: String,
    created: Timestamp,
    digest: Digest,
    #[serde(default)]
    incarnation: u64,
    manifest: Manifest,
}

impl<A: Arch> Serialize for Ami<A> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Inner { id, region, owner, name, created, incarnation, manifest } = &*self.inner;
        let (id, created, incarnation, digest) = (*id, *created, *incarnation, self.digest());
        Written { id, region, owner, name, created, digest, incarnation, manifest }.serialize(serializer)
    }
}

/// Checks everything: the manifest's rules, its digest, the name's rule, the id, the architecture.
impl<'de, A: Arch> Deserialize<'de> for Ami<A> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Read { id, region, owner, name, created, digest, incarnation, manifest } =
            Read::deserialize(deserializer)?;
        let check = || {
            let ami = AnyAmi::assemble(region, owner, name, created, manifest)?.with_incarnation(incarnation);
            if ami.digest() != digest {
                let message = format!("the manifest of {id} is {}, not {digest}", ami.digest());
                return Err(Error::new(ErrorKind::DigestMismatch, message));
            }
            if ami.id() != id {
                let message = format!("the image is {}, not {id}", ami.id());
                return Err(Error::new(ErrorKind::DigestMismatch, message));
            }
            Ok(ami.typed()?)
        };
        check().map_err(serde::de::Error::custom)
    }
}
