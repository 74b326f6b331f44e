//! The requests of the vhost-user protocol: their numbers, and how each is answered.

/// Which feature bits there are.
pub const GET_FEATURES: u32 = 1;
/// Which of them the guest has taken.
pub const SET_FEATURES: u32 = 2;
/// This connection has the device.
pub const SET_OWNER: u32 = 3;
/// It has it no more.
pub const RESET_OWNER: u32 = 4;
/// All of the guest's memory.
pub const SET_MEM_TABLE: u32 = 5;
/// Where pages are marked that were written.
pub const SET_LOG_BASE: u32 = 6;
/// Size of a ring.
pub const SET_VRING_NUM: u32 = 8;
/// Where a ring is.
pub const SET_VRING_ADDR: u32 = 9;
/// Where in a ring to begin.
pub const SET_VRING_BASE: u32 = 10;
/// Stop a ring, and say how far it came.
pub const GET_VRING_BASE: u32 = 11;
/// Start a ring; how it is kicked.
pub const SET_VRING_KICK: u32 = 12;
/// How the guest is called.
pub const SET_VRING_CALL: u32 = 13;
/// How errors of a ring are told.
pub const SET_VRING_ERR: u32 = 14;
/// Which protocol features there are.
pub const GET_PROTOCOL_FEATURES: u32 = 15;
/// Which of them the frontend has taken.
pub const SET_PROTOCOL_FEATURES: u32 = 16;
/// How many queues there are.
pub const GET_QUEUE_NUM: u32 = 17;
/// Turn a ring on or off.
pub const SET_VRING_ENABLE: u32 = 18;
/// A connection for requests in the other direction.
pub const SET_BACKEND_REQ_FD: u32 = 21;
/// Read the configuration space.
pub const GET_CONFIG: u32 = 24;
/// Write it.
pub const SET_CONFIG: u32 = 25;
/// Make an in-flight region.
pub const GET_INFLIGHT_FD: u32 = 31;
/// Use one.
pub const SET_INFLIGHT_FD: u32 = 32;
/// As when the guest begins.
pub const RESET_DEVICE: u32 = 34;
/// How many memory regions there may be.
pub const GET_MAX_MEM_SLOTS: u32 = 36;
/// One more memory region.
pub const ADD_MEM_REG: u32 = 37;
/// One less.
pub const REM_MEM_REG: u32 = 38;
/// The status that the driver has set.
pub const SET_STATUS: u32 = 39;
/// The status.
pub const GET_STATUS: u32 = 40;

/// In the other direction: the configuration space is to be read again.
pub const CONFIG_CHANGE_MSG: u32 = 2;

/// Feature bit 26: what is written into the guest's memory is to be logged.
pub const F_LOG_ALL: u64 = 1 << 26;
/// Feature bit 30: there are protocol features.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features, a bit each.
pub mod protocol {
    /// More than one queue.
    pub const MQ: u64 = 1 << 0;
    /// The log's memory comes as a descriptor.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// A sender may ask to be told how it went.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// Requests in the other direction.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// The configuration space is read and written.
    pub const CONFIG: u64 = 1 << 9;
    /// In-flight regions.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// Devices can be reset.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Memory comes and goes a region at a time.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// The device's status is told and asked for.
    pub const STATUS: u64 = 1 << 16;
    /// A ring that is stopped may leave what is in flight in its region.
    pub const GET_VRING_BASE_INFLIGHT: u64 = 1 << 20;

    /// What a server may offer, and what is passed on to it.
    pub const PASSED_ON: u64 =
        MQ | LOG_SHMFD | REPLY_ACK | CONFIG | RESET_DEVICE | CONFIGURE_MEM_SLOTS;
    /// What is done here, whatever the server can do.
    pub const ADDED: u64 =
        REPLY_ACK | BACKEND_REQ | INFLIGHT_SHMFD | STATUS | GET_VRING_BASE_INFLIGHT;
}

/// How a request that is not known, or not for this device, can be turned down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its sender waits for an answer of a form that has no place for a refusal.
    Disconnect,
    /// Its sender is told if it wants to be, and goes on in any case.
    Ignore,
}

/// Whether the server may be able to do it.
#[must_use]
pub const fn is_passed_on(request: u32) -> bool {
    matches!(
        request,
        GET_FEATURES..=SET_LOG_BASE
            | SET_VRING_NUM..=SET_VRING_ERR
            | GET_QUEUE_NUM
            | SET_VRING_ENABLE
            | GET_CONFIG
            | SET_CONFIG
            | RESET_DEVICE
            | GET_MAX_MEM_SLOTS
            | ADD_MEM_REG
            | REM_MEM_REG
    )
}

/// Whether an answer of its own belongs to it, asked for or not.
#[must_use]
pub const fn has_answer(request: u32) -> bool {
    matches!(
        request,
        GET_FEATURES
            | SET_LOG_BASE
            | GET_VRING_BASE
            | GET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | GET_CONFIG
            | GET_INFLIGHT_FD
            | GET_MAX_MEM_SLOTS
            | GET_STATUS
    )
}

/// How a request is turned down that is neither passed on nor done here.
#[must_use]
pub const fn refusal(request: u32) -> Refusal {
    match request {
        // CREATE_CRYPTO_SESSION, POSTCOPY_ADVISE, POSTCOPY_END, GET_SHARED_OBJECT,
        // SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE, GET_SHMEM_CONFIG.
        26 | 28 | 30 | 41..=44 => Refusal::Disconnect,
        _ => Refusal::Ignore,
    }
}
