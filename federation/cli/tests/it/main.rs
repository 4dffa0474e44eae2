//! The `hanse` command as people and programs use it.

mod answers;
mod approve;
mod calico_oracle;
mod corpus;
mod findings;
mod folders;
mod install;
mod json;
mod kustomize;
mod lint;
mod live;
mod offline;
mod online;
mod oracle;
mod reported;
mod selector;
mod storable;
mod workloads;
