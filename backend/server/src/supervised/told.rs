//! What servers tell each other of the guest, as JSON in the vault: what it was told of the device,
//! what its driver believes, and what it may do in a second.

use channel::RateLimits;
use domain_abi::{Capabilities, DeviceInfo, Params, Swap};
use proxy::DomainRecord;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use virtio_blk::Belief;

/// What the driver of a session believes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Believed {
    /// The session's number.
    pub(super) session: u64,
    pub(super) belief: Belief,
}

/// All of it. Members that a server does not know are ignored, those that it misses have defaults.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Told {
    domain: Domain,
    device: Device,
    belief: DriverBelief,
    /// Nothing if it was told by a server that knew of none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) limits: Option<RateLimits>,
    /// The generation on trial.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) canary: Option<u64>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Domain {
    name: String,
    version: String,
    schema_name: String,
    sha256: String,
    build_id: Option<String>,
    path: String,
    params: BTreeMap<String, String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Device {
    capacity: u64,
    block_size: u32,
    physical_block_size: u32,
    optimal_io_size: u32,
    discard_granularity: u32,
    capabilities: u64,
    may_swap: bool,
    backing_kind: String,
    backing_id: (u64, u64),
    backing_cache: u64,
    serial: String,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
struct DriverBelief {
    /// Number of the session whose driver it is; 0 if there was none.
    session: u64,
    write_cache: Option<bool>,
    is_fresh: bool,
}

impl Told {
    pub(super) fn new(record: &DomainRecord, believed: Believed, limits: RateLimits) -> Self {
        let info = &record.info;
        Self {
            domain: Domain {
                name: record.name.clone(),
                version: record.version.clone(),
                schema_name: record.schema_name.clone(),
                sha256: record.sha256.clone(),
                build_id: record.build_id.clone(),
                path: record.path.clone(),
                params: pairs(&record.params),
            },
            device: Device {
                capacity: info.capacity,
                block_size: info.block_size,
                physical_block_size: info.physical_block_size,
                optimal_io_size: info.optimal_io_size,
                discard_granularity: info.discard_granularity,
                capabilities: info.capabilities.0,
                may_swap: info.swap == Swap::SameBacking,
                backing_kind: info.backing_kind.clone(),
                backing_id: info.backing_id,
                backing_cache: info.backing_cache,
                serial: info.serial.clone(),
            },
            belief: DriverBelief {
                session: believed.session,
                write_cache: believed.belief.write_cache,
                is_fresh: believed.belief.is_fresh,
            },
            limits: Some(limits),
            canary: None,
        }
    }

    pub(super) const fn believed(&self) -> Believed {
        let DriverBelief { session, write_cache, is_fresh } = self.belief;
        Believed { session, belief: Belief { write_cache, is_fresh } }
    }

    pub(super) fn record(self) -> DomainRecord {
        let Self { domain, device, .. } = self;
        DomainRecord {
            name: domain.name,
            version: domain.version,
            schema_name: domain.schema_name,
            sha256: domain.sha256,
            build_id: domain.build_id,
            path: domain.path,
            params: params(&domain.params),
            info: DeviceInfo {
                capacity: device.capacity,
                block_size: device.block_size,
                physical_block_size: device.physical_block_size,
                optimal_io_size: device.optimal_io_size,
                discard_granularity: device.discard_granularity,
                capabilities: Capabilities(device.capabilities),
                swap: if device.may_swap { Swap::SameBacking } else { Swap::No },
                backing_kind: device.backing_kind,
                backing_id: device.backing_id,
                backing_cache: device.backing_cache,
                serial: device.serial,
            },
        }
    }
}

/// Parameters as messages have them.
pub(super) fn pairs(params: &Params) -> BTreeMap<String, String> {
    params.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// Parameters of a message.
pub(super) fn params(pairs: &BTreeMap<String, String>) -> Params {
    let mut params = Params::default();
    for (key, value) in pairs {
        params.set(key.clone(), value.clone());
    }
    params
}
