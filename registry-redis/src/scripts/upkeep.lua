-- Shared by the scripts that judge and take out.

-- What was taken out: how the log says it, and how the message does. One that is longer than this says only that there is
-- something, and readers ask for it.
local LONGEST_MESSAGE = 8192
local log, words = {}, {}

-- Owner, epoch and ttl of a value; one that was written by hand may have none.
local function split(v)
  local o, e, l = string.match(v, '^(%S+) (%d+) (%d+) ')
  return o or '', tonumber(e) or 0, tonumber(l) or 0
end

-- Takes note of a record that was taken out.
local function note(op, id)
  local n = #log
  log[n + 1], log[n + 2] = op, id
  words[#words + 1] = string.format('%s %d 0 ', op, #id) .. id
end

-- Tells what was taken out.
local function tell()
  local said = table.concat(words)
  if #words > 1 and #said > LONGEST_MESSAGE then said = '' end
  done(log, {}, said)
end

local function dead(limit)
  if now < safe then return {} end
  return redis.call('ZRANGEBYSCORE', X, '-inf', now, 'LIMIT', 0, limit)
end

-- Takes out what is over. The first write is one that a full store refuses: who cannot renew is not taken out either.
local function reap(ids)
  if #ids == 0 then return end
  redis.call('HSET', R, '~seen', now)
  for _, id in ipairs(ids) do
    redis.call('ZREM', X, id)
    if redis.call('HDEL', R, id) == 1 then note('gone', id) end
  end
end
