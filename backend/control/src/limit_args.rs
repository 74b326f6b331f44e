//! The options of a rate limit, which the daemon and `hotswapctl limit` have in common.

use crate::messages::LimitRequest;

/// The options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::Args)]
pub struct LimitArgs {
    /// How many requests the guest may send in a second, on all queues together; 0 is no limit
    #[arg(long, value_name = "N")]
    pub iops: Option<u64>,

    /// How many of them at once, after a pause [default: a tenth of a second's]
    #[arg(long, value_name = "N")]
    pub iops_burst: Option<u64>,

    /// How many bytes they may read and write in a second, with K, M, G or T for powers of 1024; 0
    /// is no limit
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub bandwidth: Option<u64>,

    /// How many of them at once, after a pause [default: a tenth of a second's]
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub bandwidth_burst: Option<u64>,
}

impl From<LimitArgs> for LimitRequest {
    fn from(args: LimitArgs) -> Self {
        let LimitArgs { iops, iops_burst, bandwidth, bandwidth_burst } = args;
        Self { off: false, iops, iops_burst, bandwidth, bandwidth_burst }
    }
}

fn size(text: &str) -> Result<u64, String> {
    domain_abi::parse_size(text)
        .ok_or_else(|| "it must be a number of bytes, with K, M, G or T for powers of 1024".into())
}
