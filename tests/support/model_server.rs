//! The published model server: see `tests/clients/model_server.mjs` for what it answers.

use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::process::Process;
use super::{PATIENCE, project_root};

pub struct ModelServer {
    /// The OpenAI base URL.
    pub base_url: String,
    _process: Process,
}

impl ModelServer {
    pub fn start() -> Self {
        let mut command = Command::new("node");
        command.arg(project_root().join("tests/clients/model_server.mjs"));
        let mut process = Process::spawn("the model server", &mut command);
        let line = process.wait_for_line(PATIENCE, |line| line.starts_with("ready ")).unwrap();
        Self { base_url: format!("{}/v1", line.trim_start_matches("ready ")), _process: process }
    }

    /// One for all tests that run at the moment; it keeps no state.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<ModelServer>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let started = Arc::new(Self::start());
            *shared = Arc::downgrade(&started);
            started
        })
    }
}
