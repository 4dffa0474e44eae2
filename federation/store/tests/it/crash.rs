//! A child process writes and says what was acknowledged; it is killed; everything it said must be there.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use hanse_store::{Key, Prefix, Store, Transaction, open_file};

const PATH: &str = "HANSE_STORE_CRASH_PATH";

/// Not a test by itself: the child of the one below.
#[test]
#[ignore = "run by kill_9_loses_nothing_acknowledged as its child"]
fn child() {
    let Ok(path) = std::env::var(PATH) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = open_file(path.as_ref()).unwrap();
        let mut out = std::io::stdout();
        let start = store.revision().await.unwrap();
        for i in start.. {
            let i = i.to_string();
            // Two keys in one transaction: both or neither.
            let both = Transaction::default()
                .put(Key::new(&["a", &i]).unwrap(), i.clone())
                .put(Key::new(&["b", &i]).unwrap(), i.clone());
            store.commit(both).await.unwrap();
            writeln!(out, "acknowledged {i}").unwrap();
            out.flush().unwrap();
        }
    });
}

#[tokio::test]
async fn kill_9_loses_nothing_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let mut acknowledged = Vec::new();
    for round in 0..6_usize {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::child", "--ignored", "--nocapture", "--test-threads=1"])
            .env(PATH, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let numbers = |line: String| line.rsplit_once("acknowledged ").and_then(|(_, n)| n.parse::<u64>().ok());
        let wanted = 5 + round * 7;
        let mut seen = 0;
        while seen < wanted {
            let line = lines.next().expect("the child writes until it is killed").unwrap();
            if let Some(number) = numbers(line) {
                acknowledged.push(number);
                seen += 1;
            }
        }
        child.kill().unwrap();
        // What it had said before the signal counts too.
        acknowledged.extend(lines.map_while(Result::ok).filter_map(numbers));
        child.wait().unwrap();
    }
    let store = open_file(&path).unwrap();
    for number in &acknowledged {
        let number = number.to_string();
        assert!(store.read(&Key::new(&["a", &number]).unwrap()).await.unwrap().is_some(), "{number} was acknowledged");
    }
    let [a, b] = ["a", "b"].map(|p| Prefix::new(&[p]).unwrap());
    let (a, b) = (store.list(&a).await.unwrap().entries.len(), store.list(&b).await.unwrap().entries.len());
    assert_eq!(a, b, "transactions are whole");
    println!("acknowledged {} transactions over 6 kills; the file holds {a}", acknowledged.len());
}
