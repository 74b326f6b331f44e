//! The codes of the control socket's own refusals, and of `hotswapctl`.
//!
//! What an operation is refused with is the device's, and comes as a string
//! ([`OperationError::code`](crate::OperationError)). `backend/ERRORS.md` lists all of them; a test
//! holds it against [`Code::ALL`].

/// Why a request, or a call of `hotswapctl`, has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// A line is no JSON.
    ParseError,
    /// A line is JSON, but no request.
    InvalidRequest,
    /// There is no such method.
    MethodNotFound,
    /// A parameter is unknown, missing, of another type or out of range.
    InvalidParams,
    /// An operation has panicked.
    InternalError,
    /// The peer is neither root nor the daemon's own user.
    PermissionDenied,
    /// There are as many clients as are served, or an idle one had to make room.
    TooManyConnections,
    /// The daemon cannot start a thread for a client.
    NoResources,
    /// The request is for a device that the daemon does not have.
    UnknownDevice,
    /// The daemon could not be asked. This and what follows is `hotswapctl`'s own.
    Unreachable,
    /// The daemon has not answered in time.
    Timeout,
    /// The daemon has ended the connection.
    Disconnected,
    /// The answer makes no sense.
    BadReply,
    /// The answer could not be printed.
    OutputFailed,
}

impl Code {
    /// All of them.
    pub const ALL: [Code; 14] = [
        Code::ParseError,
        Code::InvalidRequest,
        Code::MethodNotFound,
        Code::InvalidParams,
        Code::InternalError,
        Code::PermissionDenied,
        Code::TooManyConnections,
        Code::NoResources,
        Code::UnknownDevice,
        Code::Unreachable,
        Code::Timeout,
        Code::Disconnected,
        Code::BadReply,
        Code::OutputFailed,
    ];

    /// The word for programs: `data.code` of an error reply. It does not change.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Code::ParseError => "parse_error",
            Code::InvalidRequest => "invalid_request",
            Code::MethodNotFound => "method_not_found",
            Code::InvalidParams => "invalid_params",
            Code::InternalError => "internal_error",
            Code::PermissionDenied => "permission_denied",
            Code::TooManyConnections => "too_many_connections",
            Code::NoResources => "no_resources",
            Code::UnknownDevice => "unknown_device",
            Code::Unreachable => "unreachable",
            Code::Timeout => "timeout",
            Code::Disconnected => "disconnected",
            Code::BadReply => "bad_reply",
            Code::OutputFailed => "output_failed",
        }
    }

    /// JSON-RPC's number for it; those that JSON-RPC does not know have -32000, as the refusals of
    /// operations.
    #[must_use]
    pub const fn number(self) -> i32 {
        match self {
            Code::ParseError => -32700,
            Code::InvalidRequest => -32600,
            Code::MethodNotFound => -32601,
            Code::InvalidParams => -32602,
            Code::InternalError => -32603,
            _ => OPERATION_REFUSED,
        }
    }
}

/// JSON-RPC's number of a refusal that has no number of its own.
pub(crate) const OPERATION_REFUSED: i32 = -32000;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_code_is_listed_once() {
        let words: BTreeSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(words.len(), Code::ALL.len());
        // A code that is added after the last one and not listed would be one too many.
        assert_eq!(Code::OutputFailed as usize + 1, Code::ALL.len());
        assert!(Code::ALL.iter().enumerate().all(|(at, code)| *code as usize == at));
    }
}
