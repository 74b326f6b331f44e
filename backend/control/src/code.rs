//! The codes of the control socket's own refusals, and of `hotswapctl`.
//!
//! What an operation is refused with is the device's, and comes as a string
//! ([`OperationError::code`](crate::OperationError)). `backend/ERRORS.md` lists all of them; a test
//! holds it against [`Code::ALL`].

/// Makes the enum, its list and its words from one table: no code is missing in one of them.
macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $word:literal,)*) => {
        /// Why a request, or a call of `hotswapctl`, has no result.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Code {
            $($(#[$doc])* $name,)*
        }

        impl Code {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The word for programs: `data.code` of an error reply. It does not change.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }
        }
    };
}

codes! {
    /// A line is no JSON.
    ParseError = "parse_error",
    /// A line is JSON, but no request.
    InvalidRequest = "invalid_request",
    /// There is no such method.
    MethodNotFound = "method_not_found",
    /// A parameter is unknown, missing, of another type or out of range.
    InvalidParams = "invalid_params",
    /// An operation has panicked.
    InternalError = "internal_error",
    /// The peer is neither root nor the daemon's own user.
    PermissionDenied = "permission_denied",
    /// There are as many clients as are served, or an idle one had to make room.
    TooManyConnections = "too_many_connections",
    /// The daemon cannot start a thread for a client.
    NoResources = "no_resources",
    /// The request is for a device that the daemon does not have.
    UnknownDevice = "unknown_device",
    /// A rate limit that cannot be.
    BadLimit = "bad_limit",
    /// The daemon runs as one process, which cannot be exchanged.
    NoSupervisor = "no_supervisor",
    /// The server died while it had the request, which may have been carried out.
    ServerDied = "server_died",
    /// There is no server to carry out the request, which was not begun.
    NoServer = "no_server",
    /// Another exchange of the daemon is under way.
    ExchangeRuns = "exchange_runs",
    /// The new program cannot be run, or is none of ours.
    ProgramUnusable = "program_unusable",
    /// The new program has not answered in time.
    ProgramSilent = "program_silent",
    /// The new program cannot go on with what the running one has.
    StateRefused = "state_refused",
    /// The server could not be exchanged; the old one goes on.
    ExchangeFailed = "exchange_failed",
    /// Metrics were not asked for when the daemon was started.
    MetricsOff = "metrics_off",
    /// The daemon could not be asked. This and what follows is `hotswapctl`'s own.
    Unreachable = "unreachable",
    /// The daemon has not answered in time.
    Timeout = "timeout",
    /// The daemon has ended the connection.
    Disconnected = "disconnected",
    /// The answer makes no sense.
    BadReply = "bad_reply",
    /// The answer could not be printed.
    OutputFailed = "output_failed",
}

impl Code {
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
    fn every_code_has_a_word_of_its_own() {
        let words: BTreeSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(words.len(), Code::ALL.len());
    }
}
