-- Shared by all scripts of one service.
-- KEYS: 1 records, 2 expiry, then the log, if there is one, then, where it matters whether the owner is gone, the mark of
-- that. While a slot is moved, keys that do not exist would stop a script. ARGV: 1 nonce, 2 how to publish ('' where there
-- is no log), 3 channel.
-- Each function here costs every put a percent of its time: what puts do not need is in upkeep.lua.
local nonce, say, channel = ARGV[1], ARGV[2], ARGV[3]
local R, X, L = KEYS[1], KEYS[2], say ~= '' and KEYS[3]
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local head, seen, safe, long, gap

-- Begins with what the store says of itself, or, given a ttl, begins a new history where there is none: then the second
-- answer is true. The third is what it says, and then the values of `ids`.
local function open(ttl, ids)
  local found = redis.call('HMGET', R, '~epoch', '~head', '~seen', '~safe', '~ttl', unpack(ids or {}))
  local known, fresh = found[1], false
  head, seen, safe, long = found[2] or '-', tonumber(found[3]) or 0, tonumber(found[4]) or 0, tonumber(found[5]) or 0
  if not known and ttl then
    known, fresh = true, true
    head, seen, safe, long = '0-0/' .. nonce, now, 0, tonumber(ttl)
    redis.call('DEL', X)
    if L then redis.call('DEL', L) end
    redis.call('HSET', R, '~epoch', nonce, '~head', head, '~seen', now, '~safe', 0, '~ttl', ttl)
  end
  -- Not less than lookers that keep a little apart from each other can keep.
  gap = math.max(long * 2 / 3, 500)
  return known, fresh, found
end

-- Answers whether it is time to note that somebody looked. If nobody did for a while, the server was down or frozen, and
-- owners get their time to renew first.
local function look()
  local away = now - seen
  if away > gap or away < -gap then safe = now + long end
  return away > gap / 4 or away < 0
end

-- The expiry times were lost (evicted, say): every record gets its ttl anew, a page at a time.
local function heal()
  if redis.call('ZSCORE', X, '~') then return end
  local page = redis.call('HSCAN', R, redis.call('HGET', R, '~heal') or '0', 'COUNT', 200)
  for i = 1, #page[2], 2 do
    local ttl = tonumber(string.match(page[2][i + 1], '^%S+ %d+ (%d+) ')) or 0
    if ttl > 0 then redis.call('ZADD', X, 'NX', now + ttl, page[2][i]) end
  end
  if page[1] == '0' then
    redis.call('ZADD', X, '+inf', '~')
    redis.call('HDEL', R, '~heal')
  else
    redis.call('HSET', R, '~heal', page[1])
  end
end

-- Ends the change, with one entry of the log, which names the one before it, and one message: `log` is what it says, op and
-- id of each change, `values` the fields and values to be written, and `said` what the message says. A message may fail,
-- the poll does not.
local function done(log, values, said)
  if L and #log > 0 then
    local was = head
    head = redis.call('XADD', L, 'MAXLEN', '~', 1000, '*', 'p', was, 'n', nonce, unpack(log)) .. '/' .. nonce
    redis.call('HSET', R, '~head', head, unpack(values))
    redis.pcall(say, channel, was .. ' ' .. head .. ' ' .. said)
  elseif #values > 0 then
    redis.call('HSET', R, unpack(values))
  end
end

-- What nobody renews goes by itself, long after its ttl; the records stay where some of them never expire, and when the
-- others expire stays with them.
local function keep()
  local ttl = math.floor(4 * long + 60000)
  if L then redis.call('PEXPIRE', L, ttl) end
  if redis.call('HLEN', R) - 5 > redis.call('ZCARD', X) - 1 then
    redis.call('PERSIST', R)
    redis.call('PERSIST', X)
  else
    redis.call('PEXPIRE', R, ttl)
    redis.call('PEXPIRE', X, ttl)
  end
end
