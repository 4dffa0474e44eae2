//! The hub over real TLS on the loopback address: joining, renewing, revoking, administering, and `kill -9`.

mod administer;
mod before_the_token;
mod custom_resources;
mod exchange;
mod hostile_reports;
mod impostors;
mod join;
mod objects;
mod process;
mod support;
