//! Client tokens: a launch that is asked for twice happens once.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use ami_core::{AccountId, Digest, InstanceId};

use crate::record::{InstanceRecord, LaunchedFrom};
use crate::{Error, ErrorKind, Result};

type Key = (AccountId, String);

/// The launches that came with a token.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    launches: Mutex<HashMap<Key, Launch>>,
    /// A launch is no longer under way.
    ended: Condvar,
}

#[derive(Debug)]
struct Launch {
    parameters: Digest,
    /// The launch template that it was by, once it has happened.
    from: Option<LaunchedFrom>,
    /// What came of it; empty while it is under way.
    instances: Vec<InstanceId>,
}

/// What a token says of a launch.
pub(crate) enum Turn<'a> {
    /// It is the first: whoever holds this launches.
    First(UnderWay<'a>),
    /// It has happened, and these are its instances.
    Again(Vec<InstanceId>),
}

/// A launch that is under way. Dropped without [`done`](Self::done) it has failed, and the token is free.
pub(crate) struct UnderWay<'a> {
    tokens: &'a Tokens,
    key: Option<Key>,
}

impl Tokens {
    // Nothing that is done under the lock panics half way.
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Launch>> {
        self.launches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a launch, after another one with the same token that is under way.
    pub(crate) fn begin(&self, owner: AccountId, token: &str, parameters: Digest) -> Result<Turn<'_>> {
        let key = (owner, token.to_owned());
        let mut launches = self.lock();
        loop {
            match launches.get(&key) {
                Some(launch) if launch.parameters != parameters => {
                    let what =
                        format!("the client token {token:?} is that of a launch with other parameters");
                    return Err(Error::new(ErrorKind::IdempotentParameterMismatch, what));
                }
                Some(launch) if launch.instances.is_empty() => {
                    launches = self.ended.wait(launches).unwrap_or_else(PoisonError::into_inner);
                }
                Some(launch) => return Ok(Turn::Again(launch.instances.clone())),
                None => {
                    launches.insert(key.clone(), Launch { parameters, from: None, instances: Vec::new() });
                    return Ok(Turn::First(UnderWay { tokens: self, key: Some(key) }));
                }
            }
        }
    }

    /// The launch template that a launch with this token was by, if it has happened.
    pub(crate) fn template(&self, owner: AccountId, token: &str) -> Option<LaunchedFrom> {
        self.lock().get(&(owner, token.to_owned()))?.from.clone()
    }

    /// Takes in an instance that was there when the region was opened.
    pub(crate) fn remember(&self, record: &InstanceRecord) {
        let description = &record.description;
        if let (Some(token), Some(parameters)) = (&description.client_token, record.parameters) {
            let launch = Launch { parameters, from: record.launched_from.clone(), instances: Vec::new() };
            let key = (description.owner, token.clone());
            self.lock().entry(key).or_insert(launch).instances.push(description.id);
        }
    }

    /// An instance is remembered no more; with the last of them the token is free.
    pub(crate) fn forget(&self, id: InstanceId) {
        self.lock().retain(|_, launch| {
            let before = launch.instances.len();
            launch.instances.retain(|known| *known != id);
            launch.instances.len() == before || !launch.instances.is_empty()
        });
    }
}

impl UnderWay<'_> {
    pub(crate) fn done(mut self, instances: Vec<InstanceId>, from: Option<LaunchedFrom>) {
        if let Some(key) = self.key.take() {
            if let Some(launch) = self.tokens.lock().get_mut(&key) {
                (launch.instances, launch.from) = (instances, from);
            }
        }
        self.tokens.ended.notify_all();
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.tokens.lock().remove(&key);
            self.tokens.ended.notify_all();
        }
    }
}
