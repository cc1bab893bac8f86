-- What wrk asks: one chat request after another, under each of the keys in turn.
--   BENCH_BODY   a file with the request's body;  BENCH_KEYS   a file with a key a line
local requests = {}
local last = 0

function init()
  local headers = { ["Content-Type"] = "application/json" }
  local body = assert(io.open(os.getenv("BENCH_BODY"), "rb")):read("*a")
  for key in io.lines(os.getenv("BENCH_KEYS")) do
    headers["Authorization"] = "Bearer " .. key
    requests[#requests + 1] = wrk.format("POST", "/v1/chat/completions", headers, body)
  end
end

function request()
  last = last % #requests + 1
  return requests[last]
end

-- One line for the program that runs us. os.clock() is the processor time of this whole process.
function done(summary, latency)
  local e = summary.errors
  print(string.format(
    "RESULT %d %d %d %d %d %d %d", summary.requests, summary.duration, e.status,
    e.connect + e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(99), os.clock() * 1e6))
end
