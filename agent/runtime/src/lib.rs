//! What every process shares: logs, metrics, health, TLS identity, retry, drain.
