//! Puts a rule set into the kernel: nftables driver and the backend trait.
