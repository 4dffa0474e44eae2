//! The `hanse` command as people and programs use it.

mod corpus;
mod offline;
mod oracle;
