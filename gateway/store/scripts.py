"""The scripts: each is one step that no other can come between.

They declare all their keys, which share a slot, and keep to the commands of Redis 7.0.
"""

import hashlib
from typing import Any

# Redis speaks Lua 5.1, Dragonfly 5.4.
_PORTABLE = "local unpack = table.unpack or unpack"

# The first write of a script is one that a server without memory refuses: after any other it would let the rest pass.
# So leases are lengthened last, and by a command that it never refuses: a full server must not lose running logs.
_COMMON = """
local function last_of(log)
  local found = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  if not found then return {count = 0, seq = 0} end
  local count, seq = string.match(found[1], '^(%d+)-(%d+)$')
  local last = {exists = true, count = tonumber(count), seq = tonumber(seq)}
  for i = 1, #found[2], 2 do last['_' .. found[2][i]] = found[2][i + 1] end
  return last
end

local function id(count, seq) return string.format('%.0f-%.0f', count, seq) end

-- Whether the log is another's, or has ended. Without a lease it is whose who wrote last, and has not given it up.
local function fenced(lease, last, writer)
  local owner = redis.call('GET', lease)
  if owner then return owner ~= writer end
  return last.exists and (last._w ~= writer or last._end or last._rel) and true or false
end

local function extend(lives_ms, ...)
  for _, name in ipairs({...}) do redis.call('PEXPIRE', name, lives_ms) end
end

local function hold(name, value, life_ms)
  if redis.call('PEXPIRE', name, life_ms) == 0 then redis.call('SET', name, value, 'PX', life_ms) end
end

local function let_go(now, flight)
  if redis.call('GET', now) == flight then redis.call('DEL', now) end
end

local function give_up(lease, log, now, last, flight, writer, log_ms)
  redis.pcall('XADD', log, id(last.count, last.seq + 1), 'rel', '1', 'w', writer)
  redis.call('PEXPIRE', log, log_ms)
  redis.call('DEL', lease)
  let_go(now, flight)
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Readers in other replicas than this one; drops what is stale.
local function others(readers, replica)
  local told, sum, now = redis.call('HGETALL', readers), 0, nil
  for i = 1, #told, 2 do
    local count, until_ms = string.match(told[i + 1], '^(%d+):(%d+)$')
    now = now or now_ms()
    if not count or tonumber(until_ms) < now then
      if replica ~= '' then redis.call('HDEL', readers, told[i]) end
    elseif told[i] ~= replica then
      sum = sum + tonumber(count)
    end
  end
  return sum
end

-- A server that takes no writes can still be read.
local function tell_readers(readers, replica, count, life_ms)
  if count == '0' then
    redis.pcall('HDEL', readers, replica)
  else
    redis.pcall('HSET', readers, replica, count .. ':' .. string.format('%.0f', now_ms() + tonumber(life_ms)))
    redis.pcall('PEXPIRE', readers, life_ms)
  end
end

local function run_of(last) return string.match(last._w or '', '[^.]*$') end

local function note(mirrored, run, seen, until_ms, life_ms)
  redis.pcall('HSET', mirrored, run, seen .. ':' .. until_ms)
  redis.pcall('PEXPIRE', mirrored, life_ms)
end

-- Tells the replica that writes a log that it should look at it.
local function call_writer(lease, prefix, flight)
  local owner = redis.call('GET', lease)
  local replica = owner and string.match(owner, '^(.*)%.[^.]*$')
  if replica then redis.pcall('PUBLISH', prefix .. replica, flight) end
end

local function ring(channel) redis.pcall('PUBLISH', channel, '') end

local function finish(log, lease, now, last, flight, writer, ending, body, life_ms)
  local at = last.exists and id(last.count, last.seq + 1) or id(last.count, 1)
  if body == '' then
    redis.call('XADD', log, at, 'end', ending, 'w', writer)
  else
    redis.call('XADD', log, at, 'end', ending, 'body', body, 'w', writer)
  end
  redis.call('PEXPIRE', log, life_ms)
  redis.call('DEL', lease)
  let_go(now, flight)
end
"""

# Tells 1 where a recording is there, 0 where the caller leads, else the flight to follow.
_CLAIM = """
local rec, now, lease = unpack(KEYS)
local flight, writer, newer_than, lease_ms = unpack(ARGV)
local at = redis.pcall('HGET', rec, 'at')
if type(at) == 'string' and (tonumber(at) or -1) > tonumber(newer_than) then return 1 end
local current = redis.call('GET', now)
if current and current ~= flight then return current end
redis.call('SET', now, flight, 'PX', lease_ms)
redis.call('SET', lease, writer, 'PX', lease_ms)
return 0
"""

# Tells -1 where the log is another's, else how many frames it has, the readers elsewhere, and who was cancelled.
_APPEND = (
    _COMMON
    + """
local lease, log, now, request, readers, cancelled, mirrored = unpack(KEYS)
local replica, flight, writer, channel = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local lease_ms, log_ms, readers_ms = ARGV[5], ARGV[6], ARGV[7]
local first, count, trim_to = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local joinable, own_readers, head, asked, frames, times = ARGV[11], ARGV[12], ARGV[13], ARGV[14], ARGV[15], ARGV[16]
local last = last_of(log)
if fenced(lease, last, writer) then return -1 end
local held, grown = last.count, false
if held == first then
  -- Who takes over before there is a frame tells its own head, after another's mark, release or head.
  if head ~= '' and held == 0 and not last._h then
    redis.call('XADD', log, id(0, last.seq + 1), 'h', head, 'w', writer)
    grown = true
  end
  if count > first then
    redis.call('XADD', log, id(count, 1), 'd', frames, 't', times, 'w', writer)
    held, grown = count, true
  end
  if first == 0 and asked ~= '' then redis.call('SET', request, asked, 'PX', log_ms) end
  if trim_to > 0 then redis.call('XTRIM', log, 'MINID', id(math.min(trim_to + 1, held), 0)) end
  -- Of a log that was lost, and is written anew by another run, nobody has read anything yet.
  if grown and not last.exists then redis.call('DEL', mirrored) end
end
hold(lease, writer, lease_ms)
if joinable == '0' then
  let_go(now, flight)
elseif (redis.call('GET', now) or flight) == flight then
  hold(now, flight, lease_ms)
end
extend(log_ms, log, request, cancelled, mirrored)
tell_readers(readers, replica, own_readers, readers_ms)
if grown then ring(channel) end
return {held, others(readers, replica), redis.call('SMEMBERS', cancelled)}
"""
)

# Pages are cut: one reader that is far behind must not hold up the server, nor all others that share its connection.
_READ = (
    _COMMON
    + """
local log, lease, readers, cancelled, mirrored = unpack(KEYS)
local cursor, replica, own_readers, readers_ms, most_entries, most_bytes, flight, prefix = unpack(ARGV)
local run, behind, seen, until_ms, log_ms = unpack(ARGV, 9)
local entries, size, more, step = {}, 0, false, 16
local from = '(' .. cursor
repeat
  local found = redis.call('XRANGE', log, from, '+', 'COUNT', step)
  for _, entry in ipairs(found) do
    entries[#entries + 1] = entry
    for _, part in ipairs(entry[2]) do size = size + #part end
  end
  if #found > 0 then from = '(' .. found[#found][1] end
until #found < step or #entries >= tonumber(most_entries) or size >= tonumber(most_bytes)
if #entries % step == 0 and #entries > 0 then
  more = #redis.call('XRANGE', log, from, '+', 'COUNT', 1) > 0
end
local owner = redis.call('GET', lease)
if #entries == 0 and not owner then
  -- A log that was lost and never written anew may have ended before the cursor: that is still to be told.
  local last = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  if last and last[2][1] == 'end' and last[1] ~= cursor then entries[1] = last end
end
-- Where nobody listened, the writer takes its time with what it appends.
if own_readers ~= '0' and redis.call('HEXISTS', readers, replica) == 0 then call_writer(lease, prefix, flight) end
tell_readers(readers, replica, own_readers, readers_ms)
if run ~= '' and run_of(last_of(log)) == behind then note(mirrored, run, seen, until_ms, log_ms) end
return {entries, redis.call('EXISTS', log), redis.call('PTTL', lease), owner or '', more and 1 or 0,
  redis.call('SMEMBERS', cancelled), now_ms()}
"""
)

_TAKE_OVER = (
    _COMMON
    + """
local lease, log, now, request, cancelled, mirrored = unpack(KEYS)
local flight, writer, run, behind, channel, joinable, lease_ms, log_ms = unpack(ARGV)
local owner = redis.call('GET', lease)
if owner then return owner == writer and 1 or 0 end
local last = last_of(log)
if last._end then return 0 end
-- It was taken over by a run that this one has not heard of yet, or was lost and written anew by such.
if last.exists and run_of(last) ~= behind then return 0 end
-- Of a log that is not there nothing was shown, or it is lost: whoever holds the lease writes it from its beginning.
if last.exists then redis.call('XADD', log, id(last.count, last.seq + 1), 'run', run, 'w', writer) end
redis.call('SET', lease, writer, 'PX', lease_ms)
if joinable == '1' and (redis.call('GET', now) or flight) == flight then hold(now, flight, lease_ms) end
extend(log_ms, log, request, cancelled)
note(mirrored, run, last.count, 'ever', log_ms)  -- from here on it is in the log
ring(channel)
return 1
"""
)

_RELEASE = (
    _COMMON
    + """
local lease, log, now = unpack(KEYS)
local flight, writer, channel, log_ms = unpack(ARGV)
if redis.call('GET', lease) ~= writer then return 0 end
give_up(lease, log, now, last_of(log), flight, writer, log_ms)
ring(channel)
return 1
"""
)

# Tells -1 where the log is another's. Where `replica` is named, and another one reads the log, it is only given up: whoever
# reads it had not been heard of when that was decided.
_END = (
    _COMMON
    + """
local lease, log, now, readers = unpack(KEYS)
local flight, writer, channel, ending, body, log_ms, replica = unpack(ARGV)
local last = last_of(log)
if last._end and last._w == writer then return 1 end
if fenced(lease, last, writer) then return -1 end
if replica ~= '' and others(readers, replica) > 0 then
  give_up(lease, log, now, last, flight, writer, log_ms)
else
  finish(log, lease, now, last, flight, writer, ending, body, log_ms)
end
ring(channel)
return 1
"""
)

# Tells 1, 0 where a later-started flight's recording stays, -1 where the log is another's. Where a recording has to make
# way whose place was not declared, it tells whose: it is called again. With `give_up`, that recording is lost.
_STORE = (
    _COMMON
    + """
local rec, replaced, own_place, lease, log, now = unpack(KEYS)
local v, at, meta, sse, marks, body, req, flight, life_ms, kept_ms, give_up = unpack(ARGV, 1, 11)
local log_flight, writer, channel, ending, frames = unpack(ARGV, 12)
local last = log and last_of(log)
local ended = last and last._end and last._w == writer
if last and not ended and fenced(lease, last, writer) then return -1 end
local other = redis.pcall('HMGET', rec, 'at', 'flight')
local stays = false
if other.err then
  redis.call('DEL', rec)
elseif other[1] then
  stays = (tonumber(other[1]) or 0) > tonumber(at)
  local theirs = other[2] or ''
  if not stays and theirs ~= '' and theirs ~= flight and give_up == '0' then
    if replaced ~= rec .. ':' .. theirs then return theirs end
    redis.call('HSET', rec, 'flight', theirs)  -- changes nothing, but is refused without memory, as RENAME is not
    redis.call('RENAME', rec, replaced)
    redis.call('PEXPIRE', replaced, kept_ms)
  end
end
-- One that comes too late was replayed by its own replica for a moment: who read it there may still resume.
if not stays or flight ~= '' then
  local place = stays and own_place or rec
  redis.call('HSET', place, 'v', v, 'at', at, 'meta', meta, 'sse', sse, 'marks', marks, 'body', body, 'req', req,
    'flight', flight)
  redis.call('PEXPIRE', place, stays and kept_ms or life_ms)
end
if last and not ended then
  if not last.exists then last.count = tonumber(frames) end
  finish(log, lease, now, last, log_flight, writer, ending, '', kept_ms)
  ring(channel)
end
return stays and 0 or 1
"""
)

_PEEK = (
    _COMMON
    + """
local log, lease, rec, replaced, request, readers, cancelled, mirrored = unpack(KEYS)
local last, head = last_of(log), ''
for _, entry in ipairs(redis.call('XRANGE', log, '0', '0')) do
  if entry[2][1] == 'h' then head = entry[2][2] end
end
local recorded = redis.pcall('HGET', rec, 'flight') == ARGV[1] or redis.call('EXISTS', replaced) == 1
local seen, until_ms = string.match(redis.call('HGET', mirrored, ARGV[2]) or '', '^(%d+):(%w+)$')
local promised = until_ms and (until_ms == 'ever' or tonumber(until_ms) > now_ms())
return {last.exists and 1 or 0, last.count, head, last._end or '', redis.call('PTTL', lease), recorded and 1 or 0,
  redis.call('GET', request) or '', redis.call('SMEMBERS', cancelled), others(readers, ''), tonumber(seen or 0),
  promised and 1 or 0, redis.call('GET', lease) or last._w or ''}
"""
)

_RECORDING_OF = """
local rec, replaced = unpack(KEYS)
local from = redis.pcall('HGET', rec, 'flight') == ARGV[1] and rec or replaced
return redis.call('HMGET', from, unpack(ARGV, 2))
"""

_CANCEL = (
    _COMMON
    + """
local cancelled, lease = unpack(KEYS)
local reader, flight, prefix, life_ms = unpack(ARGV)
redis.call('SADD', cancelled, reader)
redis.call('PEXPIRE', cancelled, life_ms)
redis.pcall('PUBLISH', prefix .. flight, '')
call_writer(lease, prefix, flight)
return 1
"""
)

# Tells how many recordings went. Without a flight it is the key's current one, whichever that is.
_ERASE = (
    _COMMON
    + """
local rec, replaced, log, request, lease = unpack(KEYS)
local flight, began_by = ARGV[1], tonumber(ARGV[2])
local gone, stays = 0, false
for _, name in ipairs({rec, replaced}) do
  local found = redis.pcall('HMGET', name, 'at', 'flight')  -- of another type it has neither
  if name == replaced or flight == '' or found[2] == flight then
    if (tonumber(found[1] or '') or 0) > began_by then stays = true else gone = gone + redis.call('UNLINK', name) end
  end
end
-- Without a lease it may still run: its writer is late, or lost, and then another replica goes on with it.
if not stays and redis.call('EXISTS', lease) == 0 and last_of(log)._end then redis.call('UNLINK', log, request) end
return gone
"""
)

# What has had its life goes, up to the first that has not: behind it they live longer than they need.
_MARK = (
    _COMMON
    + """
local purges = KEYS[1]
local purge, life_ms = ARGV[1], tonumber(ARGV[2])
local now = now_ms()
redis.call('XADD', purges, '*', 'purge', purge, 'until', string.format('%.0f', now + life_ms))
local first
for _, entry in ipairs(redis.call('XRANGE', purges, '-', '+', 'COUNT', 100)) do
  first = entry[1]
  if (tonumber(entry[2][4]) or 0) >= now then break end
end
redis.call('XTRIM', purges, 'MINID', first)
if redis.call('PTTL', purges) < life_ms then redis.call('PEXPIRE', purges, ARGV[2]) end
return 1
"""
)

_COUNT = (
    _COMMON
    + """
redis.call('HSETNX', KEYS[1], 'since', string.format('%.3f', now_ms() / 1000))
for i = 2, #ARGV, 2 do redis.call('HINCRBYFLOAT', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""
)

# Of what these commands answer, each protocol and each client makes something else; what a script answers is always flat.
_PURGES = """
return redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
"""
_COUNTS = """
return redis.call('HGETALL', KEYS[1])
"""


# What is there under our names and is not ours.
_MEND = """
for place, name in ipairs(KEYS) do
  local found = redis.call('TYPE', name).ok
  if found ~= 'none' and found ~= ARGV[place] then redis.call('DEL', name) end
end
return 1
"""


class Script:
    """A script, called by its digest."""

    def __init__(self, text: str) -> None:
        self.text = _PORTABLE + text
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: list[str], *args: Any) -> tuple[Any, ...]:
        """The command that runs it."""
        return ("EVALSHA", self.digest, len(keys), *keys, *args)


CLAIM = Script(_CLAIM)
APPEND = Script(_APPEND)
READ = Script(_READ)
TAKE_OVER = Script(_TAKE_OVER)
RELEASE = Script(_RELEASE)
END = Script(_END)
STORE = Script(_STORE)
PEEK = Script(_PEEK)
RECORDING_OF = Script(_RECORDING_OF)
CANCEL = Script(_CANCEL)
ERASE = Script(_ERASE)
MARK = Script(_MARK)
PURGES = Script(_PURGES)
COUNT = Script(_COUNT)
COUNTS = Script(_COUNTS)
MEND = Script(_MEND)

_ALL = (
    MEND,
    CLAIM,
    APPEND,
    READ,
    TAKE_OVER,
    RELEASE,
    END,
    STORE,
    PEEK,
    RECORDING_OF,
    CANCEL,
    ERASE,
    MARK,
    PURGES,
    COUNT,
    COUNTS,
)

TEXTS = {script.digest: script.text for script in _ALL}
"""The scripts by their digests, for a server that does not know them yet."""
