//! JSON-RPC 2.0, one line at a time: bytes to a call, a result to bytes. Pure; no socket is near.
//!
//! It is stricter than the specification asks, because what comes in commands a device. Unknown
//! members are refused and named, so that a misspelled option cannot silently mean its default; so
//! are members that come twice, of which one reader would believe the first and another the last,
//! and ids that could not be returned exactly.
//!
//! The depth of a line is bounded by `serde_json`'s recursion limit, which stays on.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};

use crate::code::{Code, OPERATION_REFUSED};
use crate::lines::Line;
use crate::messages::{
    LimitParams, LimitRequest, NoParams, ResizeParams, ResizeRequest, RollbackParams,
    RollbackRequest, UpgradeDaemonParams, UpgradeDaemonRequest, UpgradeParams, UpgradeRequest,
};
use crate::operations::OperationError;

/// A line that is a request: whether and how to answer it, and what it wants.
#[derive(Debug)]
pub struct Call {
    /// What the reply carries; `None` is a notification, which is not answered, whatever becomes of
    /// it.
    pub id: Option<Value>,
    /// What to do, or why not.
    pub method: Result<Method, RpcError>,
}

/// A method with its parameters, checked.
#[derive(Debug, PartialEq)]
pub struct Method {
    /// Which device it is for, if that is said.
    pub device: Option<String>,
    /// What to do with it.
    pub action: Action,
}

/// What a method does.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// The state of the device.
    Status,
    /// Another domain, if it would be accepted.
    Check(UpgradeRequest),
    /// Another domain.
    Upgrade(UpgradeRequest),
    /// The domain before.
    Rollback(RollbackRequest),
    /// Another program.
    UpgradeDaemon(UpgradeDaemonRequest),
    /// A larger disk.
    Resize(ResizeRequest),
    /// How much the guest may do in a second.
    Limit(LimitRequest),
    /// What has happened.
    History,
    /// What happens from now on.
    Watch,
    /// What has been counted.
    Metrics,
    /// The end of the daemon.
    Shutdown,
}

/// An error reply's content.
#[derive(Debug, Clone, PartialEq)]
pub struct RpcError {
    /// JSON-RPC's number.
    number: i32,
    /// The stable word.
    code: &'static str,
    message: String,
    data: Option<Value>,
}

impl RpcError {
    /// An error with a code of the socket's own.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { number: code.number(), code: code.as_str(), message: message.into(), data: None }
    }

    /// The same, with more for programs: an object's members are sent beside the code.
    #[must_use]
    pub fn with_data(mut self, data: Value) -> Self {
        self.data = Some(data);
        self
    }

    /// What is no request.
    pub fn invalid_request(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, message)
    }

    fn invalid_params(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidParams, message)
    }
}

impl From<OperationError> for RpcError {
    fn from(error: OperationError) -> Self {
        let OperationError { code, message, data } = error;
        Self { number: OPERATION_REFUSED, code, message, data }
    }
}

/// The reply to the call with `id`.
pub fn reply(id: Value, result: Result<Value, RpcError>) -> Value {
    match result {
        Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
        Err(error) => {
            let mut data = match error.data {
                None => Map::new(),
                Some(Value::Object(members)) => members,
                Some(other) => Map::from_iter([("detail".to_owned(), other)]),
            };
            data.insert("code".to_owned(), error.code.into());
            let error = json!({"code": error.number, "message": error.message, "data": data});
            json!({"jsonrpc": "2.0", "id": id, "error": error})
        }
    }
}

/// The notification of event `number`, which its parameters carry as `sequence`.
pub fn event(number: u64, event: Value) -> Value {
    let mut params = match event {
        Value::Object(members) => members,
        other => Map::from_iter([("event".to_owned(), other)]),
    };
    params.insert("sequence".to_owned(), number.into());
    json!({"jsonrpc": "2.0", "method": "event", "params": params})
}

/// Reads what a client has said; a line may have `most` bytes.
///
/// # Errors
/// As for [`parse`]; a line that is too long or has no end is no request.
pub fn parse_line(line: &Line, most: usize) -> Result<Call, (Value, RpcError)> {
    let no_request = |error| Err((Value::Null, error));
    match line {
        Line::Whole(line) => parse(line),
        Line::TooLong => no_request(RpcError::invalid_request(format!(
            "a line has at most {most} bytes; this one is skipped"
        ))),
        Line::Half => {
            no_request(RpcError::new(Code::ParseError, "the last line has no end; it is ignored"))
        }
    }
}

/// Reads one line.
///
/// # Errors
/// What is no request at all; it is answered even without an id, with the id if there is a good
/// one, else null.
pub fn parse(line: &[u8]) -> Result<Call, (Value, RpcError)> {
    let members = match parse_strictly(line) {
        Ok(Value::Object(members)) => members,
        Ok(Value::Array(_)) => {
            return Err((
                Value::Null,
                RpcError::invalid_request("batches are not supported; send one object per line"),
            ));
        }
        Ok(_) => {
            return Err((
                Value::Null,
                RpcError::invalid_request("a request must be a JSON object"),
            ));
        }
        Err(error) => return Err((Value::Null, error)),
    };
    let id = members.get("id").cloned();
    if !id.as_ref().is_none_or(is_good_id) {
        let error = RpcError::invalid_request(
            "`id` must be a string, an integer of at most 64 bits, or null",
        );
        return Err((Value::Null, error));
    }
    match check_envelope(members) {
        Ok((method, params)) => Ok(Call { id, method: Method::read(&method, params) }),
        Err(error) => Err((id.unwrap_or(Value::Null), error)),
    }
}

fn is_good_id(id: &Value) -> bool {
    match id {
        Value::String(_) | Value::Null => true,
        Value::Number(number) => !number.is_f64(),
        _ => false,
    }
}

/// The method's name and its parameters, if the members are those of a request.
fn check_envelope(mut members: Map<String, Value>) -> Result<(String, Option<Value>), RpcError> {
    if members.get("jsonrpc").and_then(Value::as_str) != Some("2.0") {
        return Err(RpcError::invalid_request("`jsonrpc` must be \"2.0\""));
    }
    let Some(Value::String(method)) = members.remove("method") else {
        return Err(RpcError::invalid_request("`method` must be a string"));
    };
    let params = members.remove("params");
    if params.as_ref().is_some_and(|params| !params.is_object() && !params.is_array()) {
        return Err(RpcError::invalid_request("`params` must be an object"));
    }
    match members.keys().find(|key| !["jsonrpc", "id"].contains(&key.as_str())) {
        Some(key) => Err(RpcError::invalid_request(format!("a request has no member `{key}`"))),
        None => Ok((method, params)),
    }
}

impl Method {
    /// A request that names another device than the one that is there is not carried out.
    ///
    /// # Errors
    /// It names another one.
    pub fn check_device(&self, device: &str) -> Result<(), RpcError> {
        match self.device.as_deref() {
            Some(asked) if asked != device => {
                let asked: String = asked.chars().take(64).flat_map(char::escape_debug).collect();
                Err(RpcError::new(
                    Code::UnknownDevice,
                    format!(
                        "there is no device `{asked}`; this daemon's is `{device}`, or leave `device` out"
                    ),
                ))
            }
            _ => Ok(()),
        }
    }

    fn read(method: &str, params: Option<Value>) -> Result<Self, RpcError> {
        let plain = |action: Action, params: Option<Value>| {
            read_params(params).map(|NoParams { device }| Self { device, action })
        };
        match method {
            "status" => plain(Action::Status, params),
            "history" => plain(Action::History, params),
            "watch" => plain(Action::Watch, params),
            "metrics" => plain(Action::Metrics, params),
            "shutdown" => plain(Action::Shutdown, params),
            "check" | "upgrade" => {
                let mut params: UpgradeParams = read_params(params)?;
                let device = params.device.take();
                let request = params.check().map_err(RpcError::invalid_params)?;
                let is_check = method == "check";
                let action = if is_check { Action::Check } else { Action::Upgrade };
                Ok(Self { device, action: action(request) })
            }
            "rollback" => {
                let mut params: RollbackParams = read_params(params)?;
                let device = params.device.take();
                let request = params.check().map_err(RpcError::invalid_params)?;
                Ok(Self { device, action: Action::Rollback(request) })
            }
            "upgrade_daemon" => {
                let mut params: UpgradeDaemonParams = read_params(params)?;
                let device = params.device.take();
                let request = params.check().map_err(RpcError::invalid_params)?;
                Ok(Self { device, action: Action::UpgradeDaemon(request) })
            }
            "resize" => {
                let mut params: ResizeParams = read_params(params)?;
                let device = params.device.take();
                let request = params.check().map_err(RpcError::invalid_params)?;
                Ok(Self { device, action: Action::Resize(request) })
            }
            "limit" => {
                let mut params: LimitParams = read_params(params)?;
                let device = params.device.take();
                Ok(Self { device, action: Action::Limit(params.into()) })
            }
            _ => Err(RpcError::new(
                Code::MethodNotFound,
                format!(
                    "there is no method `{method}`; there are status, check, upgrade, \
                     rollback, upgrade_daemon, resize, limit, history, watch, metrics and shutdown"
                ),
            )),
        }
    }
}

fn read_params<T: DeserializeOwned>(params: Option<Value>) -> Result<T, RpcError> {
    let params = params.unwrap_or_else(|| Value::Object(Map::new()));
    // A derived reader would take an array as the fields in their order.
    if params.is_array() {
        return Err(RpcError::invalid_params("parameters are given by name; send an object"));
    }
    T::deserialize(params).map_err(|e| RpcError::invalid_params(format!("bad parameters: {e}")))
}

/// Reads a JSON text in which no object has a member twice.
fn parse_strictly(line: &[u8]) -> Result<Value, RpcError> {
    serde_json::from_slice::<Unique>(line).map(|Unique(value)| value).map_err(|e| {
        match e.classify() {
            // Good JSON, but `Unique` refused it.
            serde_json::error::Category::Data => RpcError::invalid_request(e.to_string()),
            _ => RpcError::new(Code::ParseError, format!("this is not JSON: {e}")),
        }
    })
}

/// A [`Value`] without members that come twice.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            array.push(item);
        }
        Ok(array.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((key, Unique(value))) = members.next_entry::<String, Unique>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!("member `{key}` comes twice")));
            }
            object.insert(key, value);
        }
        Ok(object.into())
    }
}

#[cfg(test)]
#[path = "rpc_tests.rs"]
mod tests;
