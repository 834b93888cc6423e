-- ARGV: 4 owner, 5 ttl, 6 'claim' or 'restore', then for each record: id, epoch, digest of what it may replace, ttl (0
-- for ever), value. Answers for each record: '' if it is there now, else {digest, value} of what is there instead;
-- then the head, and 1 if this began a new history.
if redis.call('EXISTS', G) == 1 then return {'gone'} end
local owner, ttl, mode = ARGV[4], ARGV[5], ARGV[6]
local _, fresh = open(ttl)
looked()
heal()
if tonumber(ttl) > long then
  long = tonumber(ttl)
  redis.call('HSET', R, '~ttl', ttl)
end
local ids = {}
for i = 7, #ARGV, 5 do ids[#ids + 1] = ARGV[i] end
local olds = redis.call('HMGET', R, unpack(ids))
local out, values, expiry, ends = {}, {}, {}, {}
for k, id in ipairs(ids) do
  local at, old = 5 * k + 2, olds[k]
  local ours, expected, life, v = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local free = not old
  if old and expected ~= '' then free = redis.sha1hex(old) == expected end
  if old and not free and mode == 'restore' then
    local o, e = split(old)
    free = (o == owner and e <= tonumber(ours)) or is_dead(id)
  end
  if free then
    if old ~= v then
      values[#values + 1], values[#values + 2] = id, v
      changed('put', id, v)
    end
    if life == '0' then redis.call('ZREM', X, id)
    else
      ends[life] = ends[life] or ms(now + life)
      expiry[#expiry + 1], expiry[#expiry + 2] = ends[life], id
    end
    out[k] = ''
  else
    out[k] = {redis.sha1hex(old), old}
  end
end
if #values > 0 then redis.call('HSET', R, unpack(values)) end
if #expiry > 0 then redis.call('ZADD', X, unpack(expiry)) end
done()
keep()
out[#out + 1] = head
out[#out + 1] = fresh and 1 or 0
return out
