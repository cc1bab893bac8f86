//! A child process whose output is kept, bounded, and which is ended by its id with its owner.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Lines of output kept of one process: enough to explain a failure.
const KEPT_LINES: usize = 20_000;

pub struct Process {
    name: String,
    child: Child,
    /// In a lock so that a shared process can be spoken of from several threads.
    stdout: Mutex<Receiver<String>>,
    output: Arc<Mutex<VecDeque<String>>>,
}

impl Process {
    pub fn spawn(name: &str, command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name} cannot be started ({command:?}): {error}"));
        let output = Arc::new(Mutex::new(VecDeque::new()));
        let (lines, stdout) = channel();
        keep(child.stdout.take().unwrap(), output.clone(), move |line| drop(lines.send(line.to_owned())));
        keep(child.stderr.take().unwrap(), output.clone(), |_| {});
        Self { name: name.to_owned(), child, stdout: Mutex::new(stdout), output }
    }

    /// Waits for a line of standard output; what the process said if it ends or is silent instead.
    pub fn wait_for_line(
        &mut self,
        within: Duration,
        matches: impl Fn(&str) -> bool,
    ) -> Result<String, String> {
        let deadline = Instant::now() + within;
        loop {
            match self
                .stdout
                .get_mut()
                .unwrap()
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) if matches(&line) => return Ok(line),
                Ok(_) => {}
                Err(_) => {
                    // The other pipe may hold the reason; a process that has ended has closed it soon.
                    std::thread::sleep(Duration::from_millis(20));
                    return Err(format!("{} was not ready: {}", self.name, self.output()));
                }
            }
        }
    }

    /// Everything it has written to either output.
    pub fn output(&self) -> String {
        self.output.lock().unwrap().iter().fold(String::new(), |text, line| text + line + "\n")
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.signal("TERM");
    }

    pub fn signal(&self, name: &str) {
        // The shell's own kill: a minimal system has no other.
        let command = format!("kill -{name} \"$0\"");
        let sent = Command::new("sh").args(["-c", &command, &self.id().to_string()]).status();
        assert!(sent.unwrap().success(), "{} is not there to be told {name}", self.name);
    }

    /// Ends it as a power cut would, and waits until it is gone.
    pub fn kill_9(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end. What else the test runs, an upstream say, runs on meanwhile.
    pub async fn wait(&mut self, within: Duration) -> ExitStatus {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} has not ended: {}", self.name, self.output());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_9();
    }
}

/// Reads a pipe to its end, so that it never fills up and stops its writer.
fn keep(
    pipe: impl Read + Send + 'static,
    output: Arc<Mutex<VecDeque<String>>>,
    each: impl Fn(&str) + Send + 'static,
) {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).into_owned();
            each(&line);
            let mut output = output.lock().unwrap();
            if output.len() == KEPT_LINES {
                output.pop_front();
            }
            output.push_back(line);
        }
    });
}
