//! What goes over the socket: methods, their parameters as they are on the wire, and as checked
//! requests.
//!
//! The parameters are the same types for the client, which writes them, and for the server, which
//! reads them. Unknown members are refused, so that a misspelled option cannot silently mean its
//! default. What is left out means the default of the *daemon*, which only
//! [`UpgradeParams::check`] and [`RollbackParams::check`] know.
//!
//! What is answered belongs to the device: its reports serialize themselves.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::canary::given;
pub use crate::canary::{CanaryParams, CanaryRequest, MAX_CANARY};
use domain_abi::Params;
use serde::{Deserialize, Serialize};

/// The name of the one device that a daemon has today. A request may name it in the member
/// `device` of its parameters, or leave that out.
pub const DEVICE: &str = "0";

/// How long a drain may take if a request does not say.
pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_millis(500);
/// How much longer workers are waited for that are not given a CPU, if a request does not say.
pub const DEFAULT_STARVED_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest drain that can be asked for, and the longest wait for a CPU. The guest waits as
/// long.
pub const MAX_DRAIN_TIMEOUT: Duration = Duration::from_secs(600);

/// Longest name of a module: no path is longer (Linux's `PATH_MAX`). Names are kept in the history.
const NAME_LIMIT: usize = 4096;

/// Which upgrade protocol to use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpgradeMode {
    /// Swap where it is right, else handover.
    #[default]
    Auto,
    /// Publish first, then wait; no request is paused.
    Swap,
    /// Gate closed, drained, state moved, gate open.
    Handover,
}

/// What to do if another upgrade is running.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenBusy {
    /// Wait for it to end, then go on.
    #[default]
    Queue,
    /// Refuse at once.
    Refuse,
}

/// The parameters of `status`, `history`, `watch` and `shutdown`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoParams {
    /// Which device, if it is said.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// The parameters of `upgrade`, of which only `name` is needed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpgradeParams {
    /// Which device, if it is said.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// A domain's name, or a module's path if it contains `/`.
    pub name: String,
    /// The new domain's parameters.
    #[serde(default)]
    pub params: BTreeMap<String, String>,
    /// Which protocol.
    #[serde(default)]
    pub mode: UpgradeMode,
    /// How long the guest may wait for the drain.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub drain_timeout_ms: Option<u64>,
    /// How much longer workers are waited for that are not given a CPU.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub starved_timeout_ms: Option<u64>,
    /// What to do if another upgrade is running.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub when_busy: Option<WhenBusy>,
    /// How it is tried, if it is.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanaryParams>,
}

/// One of the two processes that a daemon is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// What serves the rings.
    Server,
    /// What holds the connections.
    Supervisor,
}

/// The parameters of `upgrade_daemon`, none of them needed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpgradeDaemonParams {
    /// Which device, if it is said.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The new program, an absolute path. The one that runs, as it lies on disk now, if left out.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Which part is exchanged; both if left out.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub only: Option<Part>,
}

/// The parameters of `rollback`: as those of `upgrade`, and none of them needed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RollbackParams {
    /// Which device, if it is said.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// How long the guest may wait for the drain.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub drain_timeout_ms: Option<u64>,
    /// How much longer workers are waited for that are not given a CPU.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub starved_timeout_ms: Option<u64>,
    /// What to do if an upgrade is running.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub when_busy: Option<WhenBusy>,
}

/// The parameters of `resize`, of which only `size` is needed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeParams {
    /// Which device, if it is said.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Bytes that the disk is to have.
    pub size: u64,
    /// What to do if an upgrade is running.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub when_busy: Option<WhenBusy>,
}

/// The parameters of `limit`, none of them needed: what is left out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitParams {
    /// Which device, if it is said.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Forget all limits first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub off: bool,
    /// Requests in a second; 0 is no limit.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// How many of them at once.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
    /// Bytes in a second; 0 is no limit.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// How many of them at once.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<u64>,
}

/// An upgrade that was asked for, checked, with its defaults filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct UpgradeRequest {
    /// A domain's name, or a module's path if it contains `/`. Neither empty nor with a NUL.
    pub name: String,
    /// The new domain's parameters.
    pub params: Params,
    /// Which protocol.
    pub mode: UpgradeMode,
    /// How long the guest may wait for the drain, at most [`MAX_DRAIN_TIMEOUT`].
    pub drain_timeout: Duration,
    /// How much longer workers are waited for that are not given a CPU, at most
    /// [`MAX_DRAIN_TIMEOUT`].
    pub starved_timeout: Duration,
    /// What to do if another upgrade is running.
    pub when_busy: WhenBusy,
    /// How it is tried, if it is.
    pub canary: Option<CanaryRequest>,
}

/// An exchange of the daemon's program that was asked for, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeDaemonRequest {
    /// The new program; the one that runs, as it lies on disk now, if there is none.
    pub path: Option<PathBuf>,
    /// Which part is exchanged; both if there is none.
    pub only: Option<Part>,
}

/// A rollback that was asked for, checked, with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RollbackRequest {
    /// How long the guest may wait for the drain, at most [`MAX_DRAIN_TIMEOUT`].
    pub drain_timeout: Duration,
    /// How much longer workers are waited for that are not given a CPU, at most
    /// [`MAX_DRAIN_TIMEOUT`].
    pub starved_timeout: Duration,
    /// What to do if an upgrade is running.
    pub when_busy: WhenBusy,
}

/// A new size that was asked for, checked, with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResizeRequest {
    /// Bytes that the disk is to have; not 0.
    pub size: u64,
    /// What to do if an upgrade is running.
    pub when_busy: WhenBusy,
}

/// A change of the rate limits that was asked for. Whether they can be is the device's to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimitRequest {
    /// Forget all limits first.
    pub off: bool,
    /// Requests in a second; 0 is no limit.
    pub iops: Option<u64>,
    /// How many of them at once.
    pub iops_burst: Option<u64>,
    /// Bytes in a second; 0 is no limit.
    pub bandwidth: Option<u64>,
    /// How many of them at once.
    pub bandwidth_burst: Option<u64>,
}

impl From<LimitParams> for LimitRequest {
    fn from(params: LimitParams) -> Self {
        let LimitParams { device: _, off, iops, iops_burst, bandwidth, bandwidth_burst } = params;
        Self { off, iops, iops_burst, bandwidth, bandwidth_burst }
    }
}

impl ResizeParams {
    /// The request that they are.
    ///
    /// # Errors
    /// A sentence that names the member that is out of range.
    pub fn check(self) -> Result<ResizeRequest, String> {
        if self.size == 0 {
            return Err("`size` must be a number of bytes above 0".to_owned());
        }
        Ok(ResizeRequest { size: self.size, when_busy: self.when_busy.unwrap_or_default() })
    }
}

impl UpgradeParams {
    /// The request that they are.
    ///
    /// # Errors
    /// A sentence that names the member that is out of range.
    pub fn check(self) -> Result<UpgradeRequest, String> {
        if self.name.is_empty()
            || self.name.len() > NAME_LIMIT
            || self.name.contains(char::is_control)
        {
            return Err(format!(
                "`name` must be a domain's name or a module's path, of at most {NAME_LIMIT} bytes and without control characters"
            ));
        }
        let mut params = Params::default();
        for (key, value) in self.params {
            // What the command line could not say either, or would forge lines of the log.
            let impossible = |text: &str| text.contains(char::is_control);
            if key.is_empty() || key.contains('=') || impossible(&key) || impossible(&value) {
                return Err(format!("`params` has an impossible key or value at {key:?}"));
            }
            params.set(key, value);
        }
        let (drain_timeout, starved_timeout) =
            timeouts(self.drain_timeout_ms, self.starved_timeout_ms)?;
        Ok(UpgradeRequest {
            name: self.name,
            params,
            mode: self.mode,
            drain_timeout,
            starved_timeout,
            when_busy: self.when_busy.unwrap_or_default(),
            canary: self.canary.map(CanaryParams::check).transpose()?,
        })
    }
}

impl UpgradeDaemonParams {
    /// The request that they are.
    ///
    /// # Errors
    /// A sentence that names the member that is out of range.
    pub fn check(self) -> Result<UpgradeDaemonRequest, String> {
        let bad = |path: &String| {
            !path.starts_with('/') || path.len() > NAME_LIMIT || path.contains(char::is_control)
        };
        if self.path.as_ref().is_some_and(bad) {
            return Err(format!(
                "`path` must be a program's absolute path, of at most {NAME_LIMIT} bytes and \
                 without control characters"
            ));
        }
        Ok(UpgradeDaemonRequest { path: self.path.map(PathBuf::from), only: self.only })
    }
}

impl RollbackParams {
    /// The request that they are.
    ///
    /// # Errors
    /// A sentence that names the member that is out of range.
    pub fn check(self) -> Result<RollbackRequest, String> {
        let (drain_timeout, starved_timeout) =
            timeouts(self.drain_timeout_ms, self.starved_timeout_ms)?;
        let when_busy = self.when_busy.unwrap_or_default();
        Ok(RollbackRequest { drain_timeout, starved_timeout, when_busy })
    }
}

fn timeouts(drain: Option<u64>, starved: Option<u64>) -> Result<(Duration, Duration), String> {
    let timeout = |name: &str, milliseconds: Option<u64>, default| {
        let timeout = milliseconds.map_or(default, Duration::from_millis);
        if timeout > MAX_DRAIN_TIMEOUT {
            return Err(format!("`{name}` must be at most {}", MAX_DRAIN_TIMEOUT.as_millis()));
        }
        Ok(timeout)
    };
    Ok((
        timeout("drain_timeout_ms", drain, DEFAULT_DRAIN_TIMEOUT)?,
        timeout("starved_timeout_ms", starved, DEFAULT_STARVED_TIMEOUT)?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn what_is_left_out_is_not_written() {
        let written = |params: Value| params;
        assert_eq!(written(serde_json::to_value(NoParams::default()).unwrap()), json!({}));
        assert_eq!(written(serde_json::to_value(RollbackParams::default()).unwrap()), json!({}));
        let least = UpgradeParams { name: "a".into(), ..UpgradeParams::default() };
        assert_eq!(
            written(serde_json::to_value(least).unwrap()),
            json!({"name": "a", "params": {}, "mode": "auto"})
        );
    }

    #[test]
    fn what_is_written_is_read_again() {
        let all = json!({
            "device": "0", "name": "./x.so", "params": {"size": "1M"}, "mode": "handover",
            "drain_timeout_ms": 0, "starved_timeout_ms": 3, "when_busy": "refuse",
            "canary": {"seconds": 5, "max_errors": 2, "max_latency_ratio": 1.5},
        });
        let params: UpgradeParams = serde_json::from_value(all.clone()).unwrap();
        assert_eq!(serde_json::to_value(&params).unwrap(), all);
        let expected = UpgradeRequest {
            name: "./x.so".into(),
            params: Params::from_pairs(["size=1M"]).unwrap(),
            mode: UpgradeMode::Handover,
            drain_timeout: Duration::ZERO,
            starved_timeout: Duration::from_millis(3),
            when_busy: WhenBusy::Refuse,
            canary: Some(CanaryRequest {
                time: Duration::from_secs(5),
                max_errors: 2,
                max_latency_ratio: 1.5,
            }),
        };
        assert_eq!(params.check(), Ok(expected));
        let all = json!({"device": "0", "drain_timeout_ms": 7, "starved_timeout_ms": 8, "when_busy": "queue"});
        let params: RollbackParams = serde_json::from_value(all.clone()).unwrap();
        assert_eq!(serde_json::to_value(&params).unwrap(), all);
        let expected = RollbackRequest {
            drain_timeout: Duration::from_millis(7),
            starved_timeout: Duration::from_millis(8),
            when_busy: WhenBusy::Queue,
        };
        assert_eq!(params.check(), Ok(expected));
        let all = json!({"device": "0", "path": "/usr/bin/new", "only": "server"});
        let params: UpgradeDaemonParams = serde_json::from_value(all.clone()).unwrap();
        assert_eq!(serde_json::to_value(&params).unwrap(), all);
        let expected =
            UpgradeDaemonRequest { path: Some("/usr/bin/new".into()), only: Some(Part::Server) };
        assert_eq!(params.check(), Ok(expected));
        let all = json!({"device": "0", "size": 1u64 << 40, "when_busy": "refuse"});
        let params: ResizeParams = serde_json::from_value(all.clone()).unwrap();
        assert_eq!(serde_json::to_value(&params).unwrap(), all);
        let expected = ResizeRequest { size: 1 << 40, when_busy: WhenBusy::Refuse };
        assert_eq!(params.check(), Ok(expected));
        assert!(ResizeParams::default().check().unwrap_err().contains("`size`"));
    }

    #[test]
    fn a_program_is_named_by_an_absolute_path_or_not_at_all() {
        let check = |path: Option<&str>| {
            let path = path.map(str::to_owned);
            UpgradeDaemonParams { path, ..UpgradeDaemonParams::default() }.check()
        };
        assert_eq!(check(None), Ok(UpgradeDaemonRequest { path: None, only: None }));
        let long = format!("/{}", "x".repeat(NAME_LIMIT));
        for bad in ["", "new", "./new", "/a\nb", "/a\0b", &long] {
            assert!(check(Some(bad)).unwrap_err().contains("`path`"), "{bad:?}");
        }
    }
}
