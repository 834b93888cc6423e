-- Shared by all scripts of one service.
-- KEYS: 1 records, 2 expiry, 3 log, 4 gone. ARGV: 1 nonce, 2 how to publish ('' where there is no log), 3 channel.
local R, X, L, G = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local nonce, say, channel = ARGV[1], ARGV[2], ARGV[3]
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local epoch, head, seen, safe, long, gap
-- What changes: how the log says it, what was put, and how the message says it, as long as that is not too long.
local entry, put, message, size = {}, nil, {}, 0
local LONGEST_MESSAGE = 131072

-- Lua's own conversion would write 1.79e+12.
local function ms(n) return string.format('%.0f', n) end

-- Owner, epoch and ttl of a value; one that was written by hand may have none.
local function split(v)
  local o, e, l = string.match(v, '^(%S+) (%d+) (%d+) ')
  return o or '', tonumber(e) or 0, tonumber(l) or 0
end

-- Begins with what the store says of itself, or, given a ttl, begins a new history where there is none: then the second
-- answer is true.
local function open(ttl)
  local m = redis.call('HMGET', R, '~epoch', '~head', '~seen', '~safe', '~ttl')
  local fresh = not m[1]
  if fresh then
    if not ttl then return false end
    m = {nonce, '0-0/' .. nonce, ms(now), '0', ttl}
    redis.call('DEL', X, L)
    redis.call('HSET', R, '~epoch', m[1], '~head', m[2], '~seen', m[3], '~safe', m[4], '~ttl', m[5])
  end
  epoch, head = m[1], m[2] or '-'
  seen, safe, long = tonumber(m[3]) or 0, tonumber(m[4]) or 0, tonumber(m[5]) or 0
  -- Not less than lookers that keep a little apart from each other can keep.
  gap = math.max(long * 2 / 3, 500)
  return true, fresh
end

-- Nobody looked for a while: the server was down or frozen, and owners get their time to renew first.
local function look()
  local away = now - seen
  if away > gap or away < -gap then safe = now + long end
  return away > gap / 4 or away < 0
end

local function looked()
  if look() then redis.call('HSET', R, '~seen', ms(now), '~safe', ms(safe)) end
end

-- The expiry times were lost (evicted, say): every record gets its ttl anew, a page at a time.
local function heal()
  if redis.call('ZSCORE', X, '~') then return end
  local page = redis.call('HSCAN', R, redis.call('HGET', R, '~heal') or '0', 'COUNT', 200)
  for i = 1, #page[2], 2 do
    local _, _, ttl = split(page[2][i + 1])
    if ttl > 0 then redis.call('ZADD', X, 'NX', ms(now + ttl), page[2][i]) end
  end
  if page[1] == '0' then
    redis.call('ZADD', X, '+inf', '~')
    redis.call('HDEL', R, '~heal')
  else
    redis.call('HSET', R, '~heal', page[1])
  end
end

-- Takes note of a change of a record; `v` is what is put.
local function changed(op, id, v)
  if say == '' then return end
  entry[#entry + 1], entry[#entry + 2], put = op, id, v
  if size > LONGEST_MESSAGE then return end
  v = v or ''
  size = size + #id + #v
  message[#message + 1] = op .. ' ' .. #id .. ' ' .. #v
  message[#message + 1] = id .. v
end

local function is_dead(id)
  if now < safe then return false end
  local score = redis.call('ZSCORE', X, id)
  return score and tonumber(score) <= now
end

-- Takes out what is over. The first write is one that a full store refuses: who cannot renew is not taken out either.
local function reap(dead)
  if #dead == 0 then return end
  redis.call('HSET', R, '~seen', ms(now))
  for _, id in ipairs(dead) do
    redis.call('ZREM', X, id)
    if redis.call('HDEL', R, id) == 1 then changed('gone', id) end
  end
end

local function dead(limit)
  if now < safe then return {} end
  return redis.call('ZRANGEBYSCORE', X, '-inf', ms(now), 'LIMIT', 0, limit)
end

-- Ends the change, with one entry of the log, which names the one before it, and one message. What is put together with
-- others is in the message alone: who misses that asks for it. A message may fail, the poll does not.
local function done()
  if #entry == 0 then return end
  local id
  if put and #entry == 2 then id = redis.call('XADD', L, 'MAXLEN', '~', 1000, '*', 'p', head, 'n', nonce, entry[1], entry[2], 'v', put)
  else id = redis.call('XADD', L, 'MAXLEN', '~', 1000, '*', 'p', head, 'n', nonce, unpack(entry)) end
  local was = head
  head = id .. '/' .. nonce
  redis.call('HSET', R, '~head', head)
  local said = size > LONGEST_MESSAGE and '' or ' ' .. table.concat(message, ' ')
  redis.pcall(say, channel, was .. ' ' .. head .. said)
end

-- What nobody renews goes by itself, long after its ttl; the records stay where some of them never expire.
local function keep()
  local ttl = ms(4 * long + 60000)
  redis.call('PEXPIRE', X, ttl)
  redis.call('PEXPIRE', L, ttl)
  if redis.call('HLEN', R) - 5 > redis.call('ZCARD', X) - 1 then redis.call('PERSIST', R)
  else redis.call('PEXPIRE', R, ttl) end
end
