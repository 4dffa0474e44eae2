//! `hanse get --watch`: the objects, then each change.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use hanse_proto::federation::v1 as pb;
use serde_json::{Value, json};

use super::kind::name_of;
use super::manifest::{put_revision, summary};
use super::{CallError, Client, call, refused, with_client};
use crate::output::{self, ListFormat};

/// Interval between calls while the hub is unreachable.
const RETRY: Duration = Duration::from_secs(1);

/// What was printed last: each object with its revision.
type Printed = BTreeMap<(i32, String), pb::Object>;

/// Prints until the process ends. After a disconnect it calls the hub again, and prints what changed in between.
pub fn watch(context: Option<&Path>, request: &pb::GetRequest, format: ListFormat) -> anyhow::Result<ExitCode> {
    let mut known = Printed::new();
    let mut said = String::new();
    if matches!(format, ListFormat::Table | ListFormat::Wide) {
        row("CHANGE", "KIND", "NAME", "REVISION", "WHAT")?;
    }
    loop {
        let ended = with_client(context, async |client| follow(client, request, format, &mut known).await);
        match ended {
            Err(error) if CallError::is_passing(&error) && !known.is_empty() => {
                let text = format!("{error:#}");
                if text != said {
                    output::note(format_args!("{text}; trying again"));
                    said = text;
                }
                std::thread::sleep(RETRY);
            }
            ended => return ended,
        }
    }
}

async fn follow(
    mut client: Client,
    request: &pb::GetRequest,
    format: ListFormat,
    known: &mut Printed,
) -> anyhow::Result<ExitCode> {
    let mut stream = call(client.watch(request.clone())).await?;
    // Objects that are not repeated before the first end of a list were deleted.
    let mut unseen = Some(known.clone());
    loop {
        let message = stream.message().await.map_err(refused)?;
        let message = message.ok_or_else(|| CallError::Unreachable("the hub ended the watch".to_owned()))?;
        for change in message.changes {
            let object = change.object.context("a change without an object")?;
            if let Some(unseen) = &mut unseen {
                unseen.remove(&(object.kind, object.name.clone()));
            }
            print(known, object, change.deleted, format)?;
        }
        if message.revision > 0 {
            for object in unseen.take().into_iter().flat_map(BTreeMap::into_values) {
                print(known, object, true, format)?;
            }
        }
    }
}

fn print(known: &mut Printed, object: pb::Object, deleted: bool, format: ListFormat) -> anyhow::Result<()> {
    let key = (object.kind, object.name.clone());
    let change = match (known.get(&key), deleted) {
        (Some(last), false) if last.revision == object.revision => return Ok(()),
        (None, true) => return Ok(()),
        (_, true) => "DELETED",
        (Some(_), false) => "MODIFIED",
        (None, false) => "ADDED",
    };
    let kind = name_of(object.kind);
    let mut manifest: Value = serde_json::from_slice(&object.manifest).context("read a manifest")?;
    match (format, format.data()) {
        (_, Some(format)) => {
            put_revision(&mut manifest, object.revision);
            output::print(format, &json!({"type": change, "object": manifest}))?;
        }
        (ListFormat::Name, None) => output::line(format_args!("{kind}/{}", object.name))?,
        (_, None) => row(change, kind, &object.name, &object.revision.to_string(), &summary(&manifest))?,
    }
    match deleted {
        true => known.remove(&key),
        false => known.insert(key, object),
    };
    Ok(())
}

/// Rows are printed one by one: the widths fit most names.
fn row(change: &str, kind: &str, name: &str, revision: &str, what: &str) -> anyhow::Result<()> {
    output::line(format!("{change:<8}  {kind:<22}  {name:<32}  {revision:>8}  {what}").trim_end())
}
