//! A TCP proxy before one node, whose network can be damaged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub struct Proxy {
    address: String,
    /// Answers of the node are read, and not passed on.
    swallowing: Arc<AtomicBool>,
    /// Counts interruptions; connections of earlier ones are closed. Odd: none is accepted.
    epoch: watch::Sender<u64>,
}

impl Proxy {
    pub async fn start(host: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let swallowing = Arc::new(AtomicBool::new(false));
        let (epoch, current) = watch::channel(0_u64);
        let (host, swallows) = (host.to_owned(), swallowing.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if *current.borrow() % 2 == 1 {
                    continue;
                }
                tokio::spawn(serve(client, host.clone(), swallows.clone(), current.clone()));
            }
        });
        Self { address, swallowing, epoch }
    }

    pub fn host(&self) -> String {
        self.address.clone()
    }

    /// From now on, answers are lost.
    pub fn swallow_answers(&self) {
        self.swallowing.store(true, Ordering::SeqCst);
    }

    /// Closes all connections, and refuses new ones.
    pub fn interrupt(&self) {
        self.epoch.send_modify(|it| *it += 1);
    }

    pub fn resume(&self) {
        self.swallowing.store(false, Ordering::SeqCst);
        self.epoch.send_modify(|it| *it += 1);
    }
}

async fn serve(client: TcpStream, host: String, swallowing: Arc<AtomicBool>, mut epoch: watch::Receiver<u64>) {
    epoch.mark_unchanged();
    let Ok(node) = TcpStream::connect(host).await else { return };
    let ((mut from_client, mut to_client), (mut from_node, mut to_node)) = (client.into_split(), node.into_split());
    let there = tokio::io::copy(&mut from_client, &mut to_node);
    let back = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count) = from_node.read(&mut buffer).await {
            let is_lost = swallowing.load(Ordering::SeqCst);
            if count == 0 || (!is_lost && to_client.write_all(&buffer[..count]).await.is_err()) {
                return;
            }
        }
    };
    tokio::select! {
        _ = there => {}
        () = back => {}
        _ = epoch.changed() => {}
    }
}
